"""The base weights that 4-bit training used: the 16-bit checkpoint quantised to NF4 and dequantised again, by matrix.

A block of NF4 and the offset of all block maxima belong to a matrix as the loaded model holds it: Mixtral's `w1` over
`w3` of one expert is one matrix, and so is each expert of a stack in one tensor.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, local
from weakref import WeakValueDictionary

import torch

from finetune.adapters.targets import base_layout
from finetune.checkpoint import CheckpointReader
from finetune.errors import Problem, WeightsError
from finetune.moe.families import Family
from finetune.moe.nf4 import CHUNK, Nf4Stack, quantize_pieces
from finetune.moe.nf4_loading import quantized_weights

ReadRows = Callable[[str, int, int], torch.Tensor]


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


def nf4_matrices(base: CheckpointReader, family: Family) -> list[Matrix]:
    """Everything that 4-bit loading quantises of a complete 16-bit checkpoint, stacks by expert.

    Raises WeightsError where the quantiser would take a weight that is not found on disk.
    """
    layout, weights = base_layout(base, family), quantized_weights(base.config, base.folder)
    linear = {f"{module}.weight": key for key, module in layout.modules.items()}
    stacks = {stack.name: stack for stack in layout.stacks}
    unknown = sorted((weights.linear.keys() - linear.keys()) | (weights.stacks.keys() ^ stacks.keys()))
    if unknown:
        what = "4-bit loading quantises this weight, and it is not found among the tensors on disk"
        raise WeightsError([Problem(str(base.folder), what, "report this model", name) for name in unknown[:3]])
    matrices = []
    for name in weights.linear:
        rows, columns = base.info(linear[name]).shape
        matrices.append(Matrix(name, 0, (Extent(linear[name], 0, rows),), columns))
    for name, stack in stacks.items():
        for expert in range(stack.experts):
            one_tensor = len(stack.keys) == 1
            keys = stack.keys[0 if one_tensor else expert]
            shapes = [base.info(key).shape[-2:] for key in keys]
            first = expert if one_tensor else 0
            parts = tuple(Extent(key, first * rows, rows) for key, (rows, _) in zip(keys, shapes, strict=True))
            matrices.append(Matrix(name, expert, parts, shapes[0][1]))
    return matrices


def quantize(matrix: Matrix, read_rows: ReadRows, dtype: torch.dtype) -> Nf4Stack:
    """A matrix in NF4 as 4-bit loading in `dtype` stores it, as a stack of one; never in memory as a whole before."""
    stored = quantize_pieces(pieces(matrix, read_rows, dtype))
    return Nf4Stack(tuple(part[None] for part in stored), torch.Size((1, matrix.rows, matrix.columns)), dtype)


def pieces(matrix: Matrix, read_rows: ReadRows, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The values in `dtype`, flat, CHUNK of them at a time: whole blocks, but for what the last one has left."""
    step = max(1, CHUNK // matrix.columns)
    left = torch.empty(0, dtype=dtype)
    for part in matrix.parts:
        for start in range(part.first, part.first + part.rows, step):
            rows = read_rows(part.key, start, min(start + step, part.first + part.rows))
            *whole, left = torch.split(torch.cat([left, rows.to(dtype).reshape(-1)]), CHUNK)
            yield from whole
    yield left


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
        blocks = []
        for place in self._places[key]:
            first, past = max(start, place.first), min(stop, place.first + place.rows)
            if first < past:
                matrix, shift = self._quantized(place.matrix), place.row - place.first
                blocks.append(matrix.stack.rows(0, first + shift, past + shift, matrix.maxima_Q))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _quantized(self, matrix: Matrix) -> _Quantized:
        """`matrix` in NF4, quantised once for all threads that read from it at the same time."""
        with self._lock:
            quantizing = self._quantizing[matrix]
        with quantizing:
            with self._lock:
                quantized = self._live.get(matrix)
            if quantized is None:
                stack = self._quantize(matrix)
                quantized = _Quantized(stack, stack.maxima(slice(None))[0])
            self._last.quantized = quantized
            with self._lock:
                self._live[matrix] = self._kept[matrix] = quantized
                self._kept.move_to_end(matrix)
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
        return quantized
