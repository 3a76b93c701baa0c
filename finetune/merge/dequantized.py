"""The base as 4-bit training saw it: the 16-bit checkpoint with the values that its NF4 copy stands for."""

from pathlib import Path

import torch

from finetune.checkpoint import CheckpointReader
from finetune.merge.matrices import nf4_matrices, quantize
from finetune.moe.families import Family
from finetune.moe.nf4 import Nf4Stack
from finetune.moe.nf4_reader import Matrix, Nf4Reader


class DequantizedReader(Nf4Reader):
    """A 16-bit checkpoint whose quantised tensors read as dequant(quant(W)), bit for bit what training computed with.

    They come in `dtype`, the type of the training's computation, whatever their type on disk; all others as they are.
    A matrix is quantised in little more than the memory of its 4 bits.
    """

    def __init__(self, folder: Path, family: Family, dtype: torch.dtype) -> None:
        super().__init__(folder)
        self.dtype = dtype
        self._hold(nf4_matrices(self, family))

    def fetch(self, matrix: Matrix) -> Nf4Stack:
        """Quantise the tensors on disk."""

        def on_disk(key: str, start: int, stop: int) -> torch.Tensor:
            return CheckpointReader.read_rows(self, key, start, stop)

        return quantize(matrix, on_disk, self.dtype)
