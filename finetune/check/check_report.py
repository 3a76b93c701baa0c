"""The results of `finetune check` as plain values: counts, lengths and their histogram, padding, findings."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from finetune.check.duplicates import Duplicates
from finetune.check.samples import Sample
from finetune.data.tokens.packing import count_sequences
from finetune.data.tokens.stats import DataStats
from finetune.data.tokens.token_pairs import PairMixture, capacity
from finetune.errors import Problem
from finetune.recipe import Recipe

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

MAX_BINS = 16


@dataclass(frozen=True)
class Bin:
    """`rows` rows of `first` to `last` tokens."""

    first: int
    last: int
    rows: int


def histogram(lengths: Mapping[int, int], limit: int) -> list[Bin]:
    """Rows by length (`lengths`: length -> rows), from the shortest to the longest; no bin crosses `limit`.

    Bins of equal width, at most `MAX_BINS`. If one of them had more than two thirds of the rows, each bin is twice as
    wide as the one before it instead: a few long rows then do not hide the lengths of most.
    """
    if not lengths:
        return []
    longest = max(lengths)
    # Powers of two, as `limit` nearly always is.
    width = 2 ** max(0, math.ceil(math.log2(longest / MAX_BINS)))
    equal = _counted(lengths, range(0, longest + width, width), limit)
    if width == 1 or max(bin_.rows for bin_ in equal) <= 2 / 3 * sum(lengths.values()):
        return equal
    return _counted(lengths, [0, *(2**power for power in range((longest - 1).bit_length() + 1))], limit)


def _counted(lengths: Mapping[int, int], ends: Iterable[int], limit: int) -> list[Bin]:
    """Bins (start, end] with their ends at `ends`, from the first to the last that has rows."""
    edges = sorted(ends)
    if limit < edges[-1]:
        edges = sorted({*edges, limit})
    sizes = np.array(sorted(lengths))
    before = np.concatenate([[0], np.cumsum([lengths[int(size)] for size in sizes])])
    rows = np.diff(before[np.searchsorted(sizes, edges, side="right")])
    bins = [Bin(first + 1, last, int(n)) for first, last, n in zip(edges, edges[1:], rows, strict=False)]
    occupied = [index for index, bin_ in enumerate(bins) if bin_.rows]
    return bins[occupied[0] : occupied[-1] + 1]


def padding_share(tokens: npt.NDArray[np.int32], longest: npt.NDArray[np.int32], batch: int, rows: int = 1) -> float:
    """Expected share of padding tokens if `batch` random items at a time are padded to the longest.

    Each item is `rows` rows of the batch with `tokens` in total, the longest of them of `longest` tokens. Exact for
    full batches: the expected maximum of a draw without replacement, from P(all `batch` items <= n).
    """
    sizes, counts = np.unique(longest, return_counts=True)
    batch = min(batch, len(longest))
    shorter = np.cumsum(counts).astype(np.float64)
    at_most: Floats = np.ones(len(sizes))
    for drawn in range(batch):
        at_most *= np.clip(shorter - drawn, 0, None) / (len(longest) - drawn)
    expected_longest = float(sizes @ np.diff(at_most, prepend=0.0))
    return 1 - float(tokens.mean()) / (rows * expected_longest)


LONGEST = 5
"""Number of longest rows that are listed."""


@dataclass(frozen=True)
class Batches:
    """The sequences of a split: rows (or pairs: `unit`) or packed sequences, `batch` of them in a micro-batch.

    `unfilled`: share of the `capacity` of packed sequences that is not used; `padding`: expected share of padding in
    a batch.
    """

    sequences: int
    batch: int
    unfilled: float | None
    padding: float | None
    capacity: int
    unit: Literal["rows", "pairs"] = "rows"


@dataclass(frozen=True)
class Schedule:
    """Steps of one epoch and of the run, and the average tokens of a step. `epochs`: passes over the data."""

    sequences_per_step: int
    steps_per_epoch: int
    steps: int
    epochs: float
    tokens_per_step: float
    supervised_per_step: float


@dataclass(frozen=True)
class Split:
    """Training or evaluation rows, or pairs of answers; the length of a pair is that of its longer conversation."""

    name: str
    stats: DataStats
    lengths: list[Bin]  # of the rows before truncation or splitting
    longest_rows: list[tuple[int, str]]  # (tokens, file:line), longest first
    batches: Batches
    schedule: Schedule | None  # of the training rows

    @property
    def longest_listed(self) -> list[str]:
        """The longest rows, longest first."""
        return [f"{tokens:>7,}  {where}" for tokens, where in self.longest_rows]

    @property
    def duplicates_listed(self) -> list[str]:
        """The first rows with the same text as an earlier row of their data set."""
        return [f"{where} = {first}" for data_set in self.stats.sets for where, first in data_set.source.duplicate_rows]

    @property
    def bad_listed(self) -> list[str]:
        """The first rows that were left out, with the reason."""
        return [message for data_set in self.stats.sets for message in data_set.source.bad_rows]


@dataclass
class Report:
    """All results. `problems` would stop a run; `exit_code` is 2 if the recipe has one."""

    title: str
    settings: list[tuple[str, str]]  # settings of the recipe that decide the tokens
    max_length: int
    splits: list[Split] = field(default_factory=list)
    samples: list[tuple[str, Sample]] = field(default_factory=list)  # (train or eval, row)
    duplicates: Duplicates | None = None
    reasoning_remarks: list[str] = field(default_factory=list)  # answers without reasoning in a block that is opened
    schedule_remarks: list[str] = field(default_factory=list)  # warm-up, evaluations, checkpoints and the run's length
    problems: list[Problem] = field(default_factory=list)
    exit_code: int = 0

    @property
    def schedule(self) -> Schedule | None:
        """Steps of the run, None where the training rows could not be read."""
        return next((split.schedule for split in self.splits if split.schedule is not None), None)

    @property
    def remarks(self) -> list[str]:
        """Findings that do not stop a run but deserve attention, one sentence each."""
        own = [*self.schedule_remarks, *self.reasoning_remarks]
        remarks = [*own, *(remark for split in self.splits for remark in _remarks(split))]
        if self.duplicates and self.duplicates.pairs:
            count, total = self.duplicates.exact + self.duplicates.near, self.duplicates.eval_rows
            remarks.append(
                f"{count:,} of {total:,} evaluation rows also appear in the training set (exact or near duplicates)"
            )
        return remarks

    @property
    def verdict(self) -> str:
        """The closing line of a report without problems."""
        if self.remarks:
            return "No errors found: every row that the run uses can be trained on."
        return "No problems found: every row can be trained on."


def _remarks(split: Split) -> list[str]:
    stats = split.stats
    counts = {
        "bad {} left out": stats.bad,
        "{} too long and dropped": stats.dropped,
        "{} cut at the end": stats.truncated,
        "{} split into pieces": stats.split,
        "duplicate {}": stats.duplicates,
        "{} with a message that is a word for nothing (nan, None, NULL)": stats.placeholders,
    }
    phrases = [f"{count:,} {text.format('row' if count == 1 else 'rows')}" for text, count in counts.items() if count]
    return [f"{split.name}: {', '.join(phrases)}"] if phrases else []


def batches_of(lengths: npt.NDArray[np.int32], sequences: int, recipe: Recipe) -> Batches:
    """`lengths`: tokens of each row of the data set; `sequences`: rows, or packed rows."""
    batch, limit = recipe.training.per_device_train_batch_size, recipe.data.max_length
    if recipe.data.packing:
        # The padding of a batch of packed rows is at most what they leave unfilled.
        return Batches(sequences, batch, 1 - float(lengths.sum()) / (sequences * limit), None, limit)
    return Batches(sequences, batch, None, padding_share(lengths, lengths, batch), limit)


def pair_batches_of(mixture: PairMixture, recipe: Recipe, share_prompts: bool) -> Batches:
    """Pairs, packed or padded to the longest row of a batch: two rows per pair, or one if they share the prompt."""
    batch, limit = recipe.training.per_device_train_batch_size, capacity(recipe.data)
    places = mixture.places(share_prompts)
    if recipe.data.packing:
        sequences = count_sequences(places, limit)
        return Batches(sequences, batch, 1 - float(places.sum()) / (sequences * limit), None, limit, "pairs")
    longest, rows = (places, 1) if share_prompts else (mixture.longer, 2)
    return Batches(len(places), batch, None, padding_share(places, longest, batch, rows), limit, "pairs")


def schedule_of(stats: DataStats, recipe: Recipe) -> Schedule:
    """The steps as transformers' trainer counts them: the last step of an epoch takes the remaining rows."""
    training = recipe.training
    steps_per_epoch = math.ceil(stats.sequences / training.global_batch_size)
    steps = training.optimizer_steps(stats.sequences)
    return Schedule(
        sequences_per_step=training.global_batch_size,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        epochs=steps / steps_per_epoch,
        tokens_per_step=stats.tokens / steps_per_epoch,
        supervised_per_step=stats.supervised_tokens / steps_per_epoch,
    )


def split_of(name: str, stats: DataStats, batches: Batches, recipe: Recipe) -> Split:
    """The figures of a split."""
    counted: Counter[int] = Counter()
    for data_set in stats.sets:
        counted.update(data_set.source.lengths)
    longest = sorted((row for data_set in stats.sets for row in data_set.source.longest_rows), reverse=True)
    return Split(
        name=name,
        stats=stats,
        lengths=histogram(counted, recipe.data.max_length),
        longest_rows=longest[:LONGEST],
        batches=batches,
        schedule=schedule_of(stats, recipe) if name == "train" else None,
    )
