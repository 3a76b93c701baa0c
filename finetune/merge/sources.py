"""What a merged checkpoint is made from, and what it will hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from finetune.adapters.contents import FLOATS
from finetune.adapters.deltas import Change
from finetune.adapters.vocabulary import TokenRows
from finetune.checkpoint import CheckpointReader, TensorInfo, TensorSpec


@dataclass(frozen=True)
class Sources:
    """What the merged checkpoint is made from.

    Tensors in `fixed` are copied from there; `token_rows` come in place of the base's or behind them.
    """

    base: CheckpointReader
    changes: Mapping[str, Change]
    fixed: Mapping[str, TensorInfo] = field(default_factory=dict)
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)

    def specs(self, dtype: str | None) -> list[TensorSpec]:
        """The base's tensors, floating-point ones in `dtype` ("BF16") if given; those in `fixed` as they are there."""
        infos = [self.base.info(key) for key in self.base.keys]
        specs = [TensorSpec(i.key, dtype if dtype and i.dtype in FLOATS else i.dtype, i.shape) for i in infos]
        specs = [replace(spec, dtype=self.fixed[spec.key].dtype) if spec.key in self.fixed else spec for spec in specs]
        rows = self.token_rows
        return [replace(spec, shape=rows[spec.key].shape) if spec.key in rows else spec for spec in specs]


def shard_bytes(base: CheckpointReader, specs: Sequence[TensorSpec]) -> int:
    """The largest shard of the output when it is cut as the base is: one file stays one, several stay as many or so."""
    sizes: dict[Path, int] = {}
    for spec in specs:
        file = base.info(spec.key).file
        sizes[file] = sizes.get(file, 0) + spec.nbytes
    return max(sizes.values())
