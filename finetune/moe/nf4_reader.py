"""A checkpoint read as the values that its NF4 weights stand for, matrix by matrix.

A block of NF4, and the one offset of all block maxima, belong to a matrix as the loaded model holds it: Mixtral's `w1`
over `w3` of one expert is one matrix, an expert of a stack in one tensor is another.
"""

from abc import abstractmethod
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, local
from weakref import WeakValueDictionary

import torch

from finetune.checkpoint import CheckpointReader
from finetune.moe.nf4 import Nf4Stack

# Matrices in NF4 that are kept for the next tensor: `w1` and `w3` of an expert are rows of one, and `w2` lies between
# them. Two take about half of what one takes in 16 bits.
KEPT = 2


@dataclass(frozen=True)
class Extent:
    """`rows` rows of one tensor on disk (all axes but the last as one), from `first` on."""

    key: str
    first: int
    rows: int


@dataclass(frozen=True)
class Matrix:
    """One matrix: of a linear layer, or one expert's of a stack. Its rows are those of its parts, in this order."""

    weight: str  # the parameter of the loaded model
    expert: int  # 0 of a linear layer
    parts: tuple[Extent, ...]
    columns: int

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return sum(part.rows for part in self.parts)


@dataclass(frozen=True)
class _Place:
    """Rows of a tensor, from `first` on, that are the rows of `matrix` from `row` on."""

    matrix: Matrix
    first: int
    row: int
    rows: int


@dataclass(eq=False)
class _Quantized:
    """A matrix in NF4 as a stack of one, with its block maxima at hand."""

    stack: Nf4Stack
    maxima_Q: torch.Tensor


class Nf4Reader(CheckpointReader):
    """A checkpoint some of whose tensors are read from NF4; `quantized` names them.

    A matrix is fetched in NF4 when the first of its rows is read; then rows are dequantised as they are asked for. For
    several threads: each keeps the matrix that it last read from, and a few are kept for all.
    """

    dtype: torch.dtype  # of the values

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._places: dict[str, list[_Place]] = defaultdict(list)
        self._live: WeakValueDictionary[Matrix, _Quantized] = WeakValueDictionary()
        self._kept: OrderedDict[Matrix, _Quantized] = OrderedDict()
        self._lock, self._fetching = Lock(), defaultdict[Matrix, Lock](Lock)
        self._last = local()

    @abstractmethod
    def fetch(self, matrix: Matrix) -> Nf4Stack:
        """`matrix` in NF4 as a stack of one."""

    @property
    def quantized(self) -> frozenset[str]:
        """The tensors that are read from NF4."""
        return frozenset(self._places)

    def _hold(self, matrices: Iterable[Matrix]) -> None:
        """These matrices are to be read from NF4."""
        for matrix in matrices:
            row = 0
            for part in matrix.parts:
                self._places[part.key].append(_Place(matrix, part.first, row, part.rows))
                row += part.rows

    def read(self, key: str) -> torch.Tensor:
        """The whole tensor."""
        if key not in self._places:
            return super().read(key)
        info = self.info(key)
        return self.read_rows(key, 0, info.as_rows().shape[0]).reshape(info.shape)

    def read_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` (of all axes but the last, as one)."""
        if key not in self._places:
            return super().read_rows(key, start, stop)
        found = []
        for place in self._places[key]:
            first, past = max(start, place.first), min(stop, place.first + place.rows)
            if first < past:
                matrix, shift = self._quantized(place.matrix), place.row - place.first
                found.append(matrix.stack.rows(0, first + shift, past + shift, matrix.maxima_Q))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _quantized(self, matrix: Matrix) -> _Quantized:
        """`matrix` in NF4, fetched once for all threads that read from it at the same time."""
        with self._lock:
            fetching = self._fetching[matrix]
        with fetching:
            with self._lock:
                found = self._live.get(matrix)
            if found is None:
                stack = self.fetch(matrix)
                found = _Quantized(stack, stack.maxima(slice(None))[0])
            self._last.quantized = found
            with self._lock:
                self._live[matrix] = self._kept[matrix] = found
                self._kept.move_to_end(matrix)
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
        return found
