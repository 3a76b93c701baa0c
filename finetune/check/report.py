"""What `finetune check` found, as plain values: the terminal and the page are written from these."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from finetune.check.figures import Bin, histogram, padding_share
from finetune.check.samples import Sample
from finetune.check.twins import Twins
from finetune.data.tokens.packing import count_sequences
from finetune.data.tokens.stats import DataStats
from finetune.data.tokens.token_pairs import PairMixture, capacity
from finetune.errors import Problem
from finetune.recipe import Recipe

LONGEST = 5
"""So many of the longest rows are named."""


@dataclass(frozen=True)
class Batches:
    """What a step is fed with.

    `sequences` are rows (or pairs: `unit`), or packed ones, of which a batch on one device has `batch`; `unfilled`:
    share of the `capacity` of packed sequences that no token stands in; `padding`: share of pads that is expected in a
    batch.
    """

    sequences: int
    batch: int
    unfilled: float | None
    padding: float | None
    capacity: int
    unit: Literal["rows", "pairs"] = "rows"


@dataclass(frozen=True)
class Course:
    """Steps of one epoch and of the run, and what a step sees on average. `epochs`: passes over the data of the run."""

    a_step: int  # sequences
    steps_an_epoch: int
    steps: int
    epochs: float
    tokens_a_step: float
    supervised_a_step: float


@dataclass(frozen=True)
class Split:
    """Training or evaluation rows, or pairs of answers, whose length is that of the longer conversation."""

    name: str
    stats: DataStats
    lengths: list[Bin]  # of the rows as they were read, before anything is cut
    longest_rows: list[tuple[int, str]]  # (tokens, file:line), longest first
    batches: Batches
    course: Course | None  # of the training rows

    @property
    def longest_named(self) -> list[str]:
        """The longest rows, longest first."""
        return [f"{tokens:>7,}  {where}" for tokens, where in self.longest_rows]

    @property
    def duplicates_named(self) -> list[str]:
        """The first rows whose text came before in their set."""
        return [f"{where} = {first}" for each in self.stats.sets for where, first in each.source.duplicate_rows]

    @property
    def bad_named(self) -> list[str]:
        """The first rows that were left out, with what is wrong with them."""
        return [message for each in self.stats.sets for message in each.source.bad_rows]


@dataclass
class Report:
    """All of it. `problems` are what would stop a run; `exit_code` is 2 if the recipe is among them."""

    title: str
    settings: list[tuple[str, str]]  # what of the recipe decides the tokens
    max_length: int
    splits: list[Split] = field(default_factory=list)
    samples: list[tuple[str, Sample]] = field(default_factory=list)  # (train or eval, row)
    twins: Twins | None = None
    problems: list[Problem] = field(default_factory=list)
    exit_code: int = 0

    @property
    def remarks(self) -> list[str]:
        """What a run would not stop at and a reader should not miss, one sentence each."""
        said = [remark for split in self.splits for remark in _remarks(split)]
        if self.twins and self.twins.pairs:
            twins = self.twins
            said.append(
                f"{twins.exact + twins.near:,} of {twins.eval_rows:,} evaluation rows stand, word for word or nearly, "
                "in the training rows"
            )
        return said

    @property
    def verdict(self) -> str:
        """The closing line of a report without problems."""
        if self.remarks:
            return "A run can start: every row that it uses can be trained on."
        return "Nothing to complain about: a run can start, and every row can be trained on."


def _remarks(split: Split) -> list[str]:
    stats = split.stats
    counts = {
        "bad {} left out": stats.bad,
        "{} too long and dropped": stats.dropped,
        "{} cut at the end": stats.truncated,
        "{} split into pieces": stats.split,
        "duplicate {}": stats.duplicates,
    }
    said = [f"{count:,} {what.format('row' if count == 1 else 'rows')}" for what, count in counts.items() if count]
    return [f"{split.name}: {', '.join(said)}"] if said else []


def batches_of(lengths: npt.NDArray[np.int32], sequences: int, recipe: Recipe) -> Batches:
    """`lengths`: tokens of each row of the data set; `sequences`: rows, or packed rows."""
    batch, limit = recipe.training.per_device_train_batch_size, recipe.data.max_length
    if recipe.data.packing:
        # A batch of packed rows is one long row: no padding (see `Collator`).
        return Batches(sequences, batch, 1 - float(lengths.sum()) / (sequences * limit), None, limit)
    return Batches(sequences, batch, None, padding_share(lengths, lengths, batch), limit)


def pair_batches_of(mixture: PairMixture, recipe: Recipe, share_prompts: bool) -> Batches:
    """Pairs, packed or padded to the longest row of a batch: two rows each, or one where they share their prompt."""
    batch, limit = recipe.training.per_device_train_batch_size, capacity(recipe.data)
    places = mixture.places(share_prompts)
    if recipe.data.packing:
        sequences = count_sequences(places, limit)
        return Batches(sequences, batch, 1 - float(places.sum()) / (sequences * limit), None, limit, "pairs")
    longest, rows = (places, 1) if share_prompts else (mixture.longer, 2)
    return Batches(len(places), batch, None, padding_share(places, longest, batch, rows), limit, "pairs")


def course_of(stats: DataStats, recipe: Recipe) -> Course:
    """As transformers' trainer counts: the last step of an epoch takes what is left."""
    training = recipe.training
    an_epoch = math.ceil(stats.sequences / training.global_batch_size)
    steps = training.max_steps or math.ceil((training.num_train_epochs or 1.0) * an_epoch)
    return Course(
        a_step=training.global_batch_size,
        steps_an_epoch=an_epoch,
        steps=steps,
        epochs=steps / an_epoch,
        tokens_a_step=stats.tokens / an_epoch,
        supervised_a_step=stats.supervised_tokens / an_epoch,
    )


def split_of(name: str, stats: DataStats, batches: Batches, recipe: Recipe) -> Split:
    """A split's figures."""
    counted: Counter[int] = Counter()
    for each in stats.sets:
        counted.update(each.source.lengths)
    longest = sorted((row for each in stats.sets for row in each.source.longest_rows), reverse=True)
    return Split(
        name=name,
        stats=stats,
        lengths=histogram(counted, recipe.data.max_length),
        longest_rows=longest[:LONGEST],
        batches=batches,
        course=course_of(stats, recipe) if name == "train" else None,
    )
