"""The base as 4-bit training saw it: the 16-bit checkpoint with the values that its NF4 copy stands for."""

from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, local
from weakref import WeakValueDictionary

import torch

from finetune.checkpoint import CheckpointReader
from finetune.merge.matrices import Matrix, nf4_matrices, quantize
from finetune.moe.families import Family
from finetune.moe.nf4 import Nf4Stack

# Matrices in NF4 that are kept for the next tensor: `w1` and `w3` of an expert are rows of one, and `w2` lies between
# them. Two take about half of what one takes in 16 bits.
KEPT = 2


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


class DequantizedReader(CheckpointReader):
    """A 16-bit checkpoint whose quantised tensors read as dequant(quant(W)), bit for bit what training computed with.

    They come in `dtype`, the type of the training's computation, whatever their type on disk; all others as they are.
    A matrix is quantised when the first of its rows is read, in little more than the memory of its 4 bits; rows are
    dequantised when they are asked for. Safe for several threads: each keeps the matrix that it last read from, and
    the last few are kept for all.
    """

    def __init__(self, folder: Path, family: Family, dtype: torch.dtype) -> None:
        super().__init__(folder)
        self.dtype = dtype
        self._places: dict[str, list[_Place]] = defaultdict(list)
        for matrix in nf4_matrices(self, family):
            row = 0
            for part in matrix.parts:
                self._places[part.key].append(_Place(matrix, part.first, row, part.rows))
                row += part.rows
        self._live: WeakValueDictionary[Matrix, _Quantized] = WeakValueDictionary()
        self._kept: OrderedDict[Matrix, _Quantized] = OrderedDict()
        self._lock, self._quantizing = Lock(), defaultdict[Matrix, Lock](Lock)
        self._last = local()

    def _quantize(self, matrix: Matrix) -> Nf4Stack:
        """The matrix in NF4 as a stack of one, from the tensors on disk."""
        return quantize(matrix, super().read_rows, self.dtype)

    @property
    def quantized(self) -> frozenset[str]:
        """Names of the tensors that read as what their NF4 stands for."""
        return frozenset(self._places)

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
        """`matrix` in NF4, quantised once for all threads that read from it at the same time."""
        with self._lock:
            quantizing = self._quantizing[matrix]
        with quantizing:
            with self._lock:
                found = self._live.get(matrix)
            if found is None:
                stack = self._quantize(matrix)
                found = _Quantized(stack, stack.maxima(slice(None))[0])
            self._last.quantized = found
            with self._lock:
                self._live[matrix] = self._kept[matrix] = found
                self._kept.move_to_end(matrix)
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
        return found
