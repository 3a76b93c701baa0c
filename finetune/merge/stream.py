"""Stream a base checkpoint into a merged one, a block of rows at a time; nothing larger than a block is in memory."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from finetune.checkpoint import CheckpointReader, CheckpointWriter, TensorInfo, TensorSpec
from finetune.checkpoint.dtypes import TORCH_DTYPES
from finetune.checkpoint.reader import read_tensor
from finetune.errors import Problem, WeightsError
from finetune.merge.adapter import FLOATS
from finetune.merge.deltas import Delta
from finetune.merge.factors import FactorReader
from finetune.merge.vocabulary import TokenRows

# Elements of a block: 4 MiB in fp32, of which a handful are in memory at a time.
BLOCK_ELEMENTS = 2**20


@dataclass
class PartNorms:
    """Sums of squares over all targeted tensors of one part of the model, fp64."""

    base: float = 0.0
    delta: float = 0.0
    rounding: float = 0.0  # of what rounding to the output dtype lost


@dataclass
class Ledger:
    """What the stream did, recorded where it did it; the proof is read from here."""

    used: dict[tuple[str, int], list[tuple[int, int]]] = field(default_factory=dict)  # path, expert -> (row, past it)
    targeted: set[str] = field(default_factory=set)  # tensors whose change is not zero
    norms: dict[str, PartNorms] = field(default_factory=dict)


def output_specs(
    base: CheckpointReader, dtype: str | None, fixed: Mapping[str, TensorInfo], rows: Mapping[str, TokenRows]
) -> list[TensorSpec]:
    """The base's tensors, floating-point ones in `dtype` ("BF16") if given; those in `fixed` as they are there.

    `rows`: of added tokens, for which a matrix may be longer than the base's.
    """
    infos = [base.info(key) for key in base.keys]
    specs = [TensorSpec(i.key, dtype if dtype and i.dtype in FLOATS else i.dtype, i.shape) for i in infos]
    specs = [replace(spec, dtype=fixed[spec.key].dtype) if spec.key in fixed else spec for spec in specs]
    return [replace(spec, shape=rows[spec.key].shape) if spec.key in rows else spec for spec in specs]


def shard_bytes(base: CheckpointReader, specs: Sequence[TensorSpec]) -> int:
    """The largest shard of the output when it is cut as the base is: one file stays one, several stay as many or so."""
    sizes: dict[Path, int] = {}
    for spec in specs:
        file = base.info(spec.key).file
        sizes[file] = sizes.get(file, 0) + spec.nbytes
    return max(sizes.values())


def stream_merged(
    base: CheckpointReader,
    deltas: Mapping[str, Delta],
    folder: Path,
    specs: Sequence[TensorSpec],
    fixed: Mapping[str, TensorInfo],
    token_rows: Mapping[str, TokenRows],
    advance: Callable[[int], object] = lambda _: None,
) -> Ledger:
    """Write base + deltas to `folder` as `specs` says; arithmetic in fp32.

    Tensors in `fixed` are copied from there, `token_rows` put in place of the base's or behind them. `advance` is told
    the bytes as they pass. Raises WeightsError for a result that is not finite.
    """
    ledger, factors = Ledger(), FactorReader()
    with CheckpointWriter(folder, specs, shard_bytes(base, specs)) as writer:
        for spec in specs:
            info = fixed.get(spec.key, base.info(spec.key))
            delta = deltas.get(spec.key)
            out = TORCH_DTYPES[spec.dtype]
            for start, stop in blocks(info, None if delta is None else delta.shape[0]):
                rows = read_tensor(info.as_rows(), start, stop)
                if delta is None:
                    merged = rows.to(out)
                else:
                    merged = _merge_rows(rows, delta.rows(start, stop, factors), delta, start, out, ledger)
                if spec.key in token_rows:
                    merged = token_rows[spec.key].put(merged, start)
                _require_finite(merged, spec.key)
                writer.write_rows(spec.key, start, merged)
                advance(rows.numel() * rows.itemsize)
            if spec.key in token_rows:
                beyond = token_rows[spec.key].beyond(out)
                _require_finite(beyond, spec.key)
                writer.write_rows(spec.key, token_rows[spec.key].base_rows, beyond)
    return ledger


def blocks(info: TensorInfo, within: int | None = None) -> Iterator[tuple[int, int]]:
    """Cut a tensor into ranges of rows, none of which straddles a multiple of `within` (the rows of one expert).

    A tensor without an axis is one block of its own.
    """
    if not info.shape:
        yield 0, 1
        return
    count, *columns = info.as_rows().shape
    step = max(1, BLOCK_ELEMENTS // max([1, *columns]))
    within = within or max(count, 1)
    for first in range(0, count, within):
        for start in range(first, first + within, step):
            yield start, min(start + step, first + within)


def _merge_rows(
    rows: torch.Tensor, delta_nI: torch.Tensor, delta: Delta, start: int, dtype: torch.dtype, ledger: Ledger
) -> torch.Tensor:
    """Base rows from `start` on plus their change, added in fp32 and rounded once; the ledger learns what was done."""
    base_nI = rows.to(torch.float32, copy=True)
    norms = ledger.norms.setdefault(delta.part, PartNorms())
    norms.base += _square(base_nI)
    delta_square = _square(delta_nI)
    norms.delta += delta_square
    if delta_square or bool(delta_nI.any()):  # a square can underflow
        ledger.targeted.add(delta.key)
    exact_nI = base_nI.add_(delta_nI)
    merged = exact_nI.to(dtype)
    norms.rounding += _square(torch.sub(exact_nI, merged, out=delta_nI))
    expert, row = delta.place(start)
    ledger.used.setdefault((delta.path, expert), []).append((row, row + len(rows)))
    return merged


def _square(x: torch.Tensor) -> float:
    return float(x.reshape(-1).dot(x.reshape(-1)))


def _require_finite(rows: torch.Tensor, key: str) -> None:
    # A sum in fp32 is finite exactly when its terms are (short of 1e32), at a third of the price of looking at each.
    if rows.is_floating_point() and not math.isfinite(float(rows.sum(dtype=torch.float32))):
        do = "check the base, the adapter (a run that diverged?) and, with --dtype float16, the range of the weights"
        raise WeightsError(Problem(key, "merged tensor is not finite", do))
