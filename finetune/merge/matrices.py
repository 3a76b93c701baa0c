"""The matrices that 4-bit loading quantises one by one, and where their rows are on disk.

A block of NF4, and the offset of all block maxima, belong to a matrix as the loaded model holds it: Mixtral's `w1` over
`w3` of one expert is one matrix, an expert of a stack in one tensor is another.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from finetune.adapters.layout import base_layout
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
    layout, weights = base_layout(base, family), quantized_weights(base.config)
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
