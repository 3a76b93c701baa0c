"""Token rows as compact arrays (8 bytes a token), and the `datasets.Dataset` made of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset

from finetune.data.packing import best_fit_decreasing
from finetune.data.render import IGNORED

Ints = npt.NDArray[np.int32]


@dataclass
class TokenRows:
    """Rows in file order: token ids, labels (`IGNORED` where not supervised; not shifted), 1-based line numbers."""

    input_ids: list[Ints] = field(default_factory=list)
    labels: list[Ints] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)

    def append(self, input_ids: Sequence[int] | Ints, labels: Sequence[int] | Ints, line: int) -> None:
        """Add one row."""
        self.input_ids.append(np.asarray(input_ids, dtype=np.int32))
        self.labels.append(np.asarray(labels, dtype=np.int32))
        self.lines.append(line)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(ids) for ids in self.input_ids)

    @property
    def supervised_tokens(self) -> int:
        """Tokens that carry a loss."""
        return sum(int((labels != IGNORED).sum()) for labels in self.labels)

    def dataset(self) -> Dataset:
        """Columns `input_ids`, `labels`, `row`: int."""
        columns = {"input_ids": _lists(self.input_ids), "labels": _lists(self.labels), "row": pa.array(self.lines)}
        return Dataset(pa.table(columns))

    def packed_dataset(self, max_length: int) -> Dataset:
        """Columns `input_ids`, `labels`, `position_ids` (restarting at each document), `row`: the line numbers."""
        bins = best_fit_decreasing([len(ids) for ids in self.input_ids], max_length)
        columns = {
            "input_ids": _lists([np.concatenate([self.input_ids[i] for i in indices]) for indices in bins]),
            "labels": _lists([np.concatenate([self.labels[i] for i in indices]) for indices in bins]),
            "position_ids": _lists([_positions([len(self.input_ids[i]) for i in indices]) for indices in bins]),
            "row": _lists([np.array([self.lines[i] for i in indices]) for indices in bins]),
        }
        return Dataset(pa.table(columns))


def _positions(lengths: list[int]) -> Ints:
    return np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])


def _lists(rows: Sequence[npt.NDArray[np.signedinteger]]) -> pa.LargeListArray:
    # Large lists: with 32-bit offsets a data set would end at 2^31 tokens.
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)))
