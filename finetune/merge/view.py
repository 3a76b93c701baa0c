"""A merged checkpoint that nobody has written: each tensor is made when it is read."""

from dataclasses import replace

import torch

from finetune.adapters.factors import FactorReader
from finetune.checkpoint import CheckpointReader, TensorInfo, TensorSpec
from finetune.checkpoint.reader import TORCH_DTYPES, read_tensor
from finetune.merge.sources import Sources


class MergedReader(CheckpointReader):
    """What a merge of `sources` as `specs` would write.

    `shift` and `delta` hold, for tensors with a change that were read, the squares of two norms: of what the base
    differs by from the one `beside` it, and of the change.
    """

    def __init__(self, sources: Sources, specs: list[TensorSpec], beside: CheckpointReader) -> None:
        self.folder, self.sources = sources.base.folder, sources
        self._specs = {spec.key: spec for spec in specs}
        self._beside = beside
        self._factors = FactorReader()
        self.keys = list(self._specs)
        self.shift: dict[str, float] = {}
        self.delta: dict[str, float] = {}

    def holds(self, key: str) -> bool:
        """Whether it has a tensor of this name."""
        return key in self._specs

    def info(self, key: str) -> TensorInfo:
        """As the tensor would be written; it lies nowhere."""
        spec = self._specs[key]
        return replace(self.sources.base.info(key), dtype=spec.dtype, shape=spec.shape, nbytes=spec.nbytes)

    def read(self, key: str) -> torch.Tensor:
        """The whole tensor, added in fp32 and rounded once."""
        spec, sources = self._specs[key], self.sources
        dtype = TORCH_DTYPES[spec.dtype]
        if key in sources.fixed:
            return read_tensor(sources.fixed[key]).to(dtype)
        change = sources.changes.get(key)
        merged = sources.base.read(key) if change is None else self._changed(key)
        merged = merged.to(dtype)
        return sources.token_rows[key].onto(merged) if key in sources.token_rows else merged

    def read_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` (of all axes but the last, as one)."""
        whole = self.read(key)
        return whole.reshape(-1, whole.shape[-1])[start:stop]

    def _changed(self, key: str) -> torch.Tensor:
        base, change = self.sources.base, self.sources.changes[key]
        info = base.info(key).as_rows()
        merged = torch.empty(info.shape, dtype=torch.float32)
        shift = delta = 0.0
        for first in range(0, info.shape[0], change.step):
            past = first + change.step
            left_nR, right_RI = change.factors(first, self._factors)
            rows = base.read_rows(key, first, past).float()
            shift += _square(rows - self._beside.read_rows(key, first, past))
            added = left_nR @ right_RI
            delta += _square(added)
            torch.add(rows, added, out=merged[first:past])
        self.shift[key], self.delta[key] = shift, delta
        return merged.reshape(base.info(key).shape)


def _square(values: torch.Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
