"""The data set of a preference run: tables of pairs, mixed and packed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
import pyarrow as pa
from datasets import Dataset

from finetune.data.row_errors import MAX_PROBLEMS
from finetune.data.tokens.cache import PAIRS, TokenTable
from finetune.data.tokens.examples import PAIRED_ROWS
from finetune.data.tokens.packing import Bins, Indices, best_fit_decreasing
from finetune.data.tokens.prepare import Mixture, prepare_mixture
from finetune.data.types import Ints, TokenPair
from finetune.recipe import DataSettings, DataSource

_PROMPT, _CHOSEN, _REJECTED = (PAIRS.names.index(name) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))


class PairTable(Sequence[TokenPair]):
    """Pairs of several sets, memory-mapped: `table_of` is the table of each pair, `row_of` its row there."""

    def __init__(self, tables: Sequence[TokenTable], table_of: Indices, row_of: Indices) -> None:
        self._tables, self._table_of, self._row_of = tables, table_of, row_of

    def __len__(self) -> int:
        return len(self._row_of)

    @overload
    def __getitem__(self, index: int) -> TokenPair: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[TokenPair]: ...

    def __getitem__(self, index: int | slice) -> TokenPair | Sequence[TokenPair]:
        if isinstance(index, slice):
            return PairTable(self._tables, self._table_of[index], self._row_of[index])
        columns, where = self._tables[self._table_of[index]].row(int(self._row_of[index]))
        prompt, chosen, chosen_labels, rejected, rejected_labels = columns
        return TokenPair(prompt, chosen, chosen_labels, rejected, rejected_labels, where)


@dataclass(frozen=True)
class PairMixture(Mixture):
    """Prepared pairs of several sources, and which of them make the data set."""

    @cached_property
    def table(self) -> PairTable:
        """The pairs in the order of the data set, those that are used twice twice."""
        table_of = np.repeat(np.arange(len(self.sets)), [len(indices) for indices in self.chosen])
        return PairTable([rows.table() for rows in self.sets], table_of, np.concatenate(self.chosen))

    def places(self, share_prompts: bool) -> Ints:
        """Tokens of each pair in a packed sequence: two conversations, or one prompt with two answers behind it.

        A prompt that is shared comes once, but its last token before each answer.
        """
        return self.lengths - self._tokens(_PROMPT) + 1 if share_prompts else self.lengths

    @property
    def longer(self) -> Ints:
        """Tokens of the longer conversation of each pair."""
        longer: Ints = self._tokens(_PROMPT) + np.maximum(self._tokens(_CHOSEN), self._tokens(_REJECTED))
        return longer

    def _tokens(self, column: int) -> Ints:
        """How long a column of `PAIRS` is in each pair of the data set."""
        tables = [rows.table() for rows in self.sets]
        return np.concatenate(
            [table.lengths(column)[indices] for table, indices in zip(tables, self.chosen, strict=True)]
        )

    def dataset(self, settings: DataSettings, share_prompts: bool) -> Dataset:
        """Column `pairs`: indices into `table`, one a row, or with packing those that share a sequence; and `length`,
        the row's tokens, which is where transformers looks for them (`train_sampling_strategy: group_by_length`)."""
        places = self.places(share_prompts)
        bins = Bins(np.arange(len(places)), np.arange(1, len(places) + 1))
        if settings.packing:
            bins = best_fit_decreasing(places, capacity(settings))
        ends = np.concatenate([[0], bins.ends]).astype(np.int32)
        pairs = pa.ListArray.from_arrays(pa.array(ends), pa.array(bins.rows))
        return Dataset.from_dict({"pairs": pairs, "length": np.add.reduceat(places[bins.rows], ends[:-1])})


def capacity(settings: DataSettings) -> int:
    """Places of a packed sequence of pairs: any pair fits whose conversations fit `max_length`."""
    return 2 * settings.max_length


def prepare_pair_mixture(
    sources: Sequence[DataSource],
    tokenizer: Any,
    settings: DataSettings,
    seed: int,
    max_problems: int = MAX_PROBLEMS,
) -> PairMixture:
    """Read and check every pair, and choose those that are used."""
    if settings.loss_on != "assistant" or settings.overlong == "split":
        raise ValueError("the loss of a pair is on its answers, and a pair is not split")
    mixture = prepare_mixture(sources, tokenizer, settings, seed, max_problems, PAIRED_ROWS)
    return PairMixture(mixture.sets, mixture.sources, mixture.chosen)
