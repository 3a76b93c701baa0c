"""`--requantize nf4`: the merged model is written as 4-bit loading would store it, and what that costs is measured.

The 16-bit merge is made and proven first, in a folder of its own; what is written from it is read again and held
against it value by value. Rounding to NF4 is lossy by design: its bars are what NF4 can lose at most, and what the base
itself loses by it.
"""

import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from bitsandbytes.functional import create_dynamic_map, get_4bit_type

from finetune.checkpoint import CheckpointReader, CheckpointWriter, TensorSpec
from finetune.checkpoint.dtypes import TORCH_DTYPES
from finetune.errors import Problem, WeightsError
from finetune.files import write_json
from finetune.merge.dequantized import DequantizedReader
from finetune.merge.job import Job
from finetune.merge.journal import JOURNAL_FILE
from finetune.merge.ledger import Ledger, Outcome
from finetune.merge.logits import LayerwiseModel
from finetune.merge.matrices import nf4_matrices, pieces, quantize
from finetune.merge.reference import QuantizedModel
from finetune.merge.report import Nf4Figures
from finetune.merge.stream import blocks
from finetune.moe.families import Family
from finetune.moe.nf4 import BLOCKSIZE, NESTED_BLOCKSIZE
from finetune.moe.nf4_reader import Matrix
from finetune.moe.quantized import quantized_weights
from finetune.moe.quantizer import STACK_PARTS
from finetune.moe.stored import StoredReader, linear_tensors, quantization_config, stored_specs

# Times the distance of logits that rounding the base to NF4 makes, which is taken on the same prompts: the merged model
# may be off by so much. 1 is to be expected, and more where training has made the logits larger; 1.5 was measured.
MAX_OF_THE_BASES_OWN = 3.0
# What is left of the bound on a single value for the order of operations.
SLACK = 1e-3


# The folders, in the unfinished one, of the merged checkpoint in 16 bits and of its copy.
SIXTEEN_BITS, FOUR_BITS = ".16-bit", ".nf4"


def sixteen_bits(folder: Path) -> Path:
    """The folder, in an unfinished one, for the merge in 16 bits; whatever else a killed merge left goes away."""
    for path in folder.iterdir():
        if path.name != SIXTEEN_BITS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / SIXTEEN_BITS).mkdir(exist_ok=True)
    return folder / SIXTEEN_BITS


def nf4_bytes(job: Job) -> int:
    """Bytes of the copy, before there is anything to copy."""
    taken = {part.key for matrix in nf4_matrices(job.base, job.family) for part in matrix.parts}
    weights = quantized_weights(job.config)
    stored = [
        spec for name, shape in (*weights.linear.items(), *weights.stacks.items()) for spec in stored_specs(name, shape)
    ]
    return sum(spec.nbytes for spec in (*stored, *(spec for spec in job.specs if spec.key not in taken)))


def write_nf4(
    job: Job,
    ledger: Ledger,
    merged: Path,
    folder: Path,
    reference: Mapping[str, torch.Tensor] | None,
    advance: Callable[[int], object] = lambda _: None,
) -> Nf4Figures:
    """Put the NF4 copy of the checkpoint in `merged` into `folder`, proven, and take the 16-bit one away.

    `reference`: logits of base and of base + adapter; without them the copy is not read again. `advance` is told the
    bytes of 16 bits, twice. Raises WeightsError for a copy that is not what rounding to NF4 makes.
    """
    copied = folder / FOUR_BITS
    write_json(merged / "config.json", job.config)
    copy = Nf4Copy.of(CheckpointReader(merged), job.family)
    copy.write(copied, advance)
    figures = Nf4Figures(len(copy.matrices), copy.nbytes)
    if reference is not None:
        write_json(copied / "config.json", {**job.config, "quantization_config": quantization_config()})
        lost = copy.prove(copied, ledger.outcomes, advance)
        off, usual = _logit_errors(job, copied, reference)
        figures = replace(figures, lost=lost, logit_error_mean=off, base_error_mean=usual)
        judge_nf4(figures)
    for file in copied.glob("model*"):
        file.rename(folder / file.name)
    shutil.rmtree(copied)
    (merged / JOURNAL_FILE).unlink(missing_ok=True)  # first, so that a kill leaves none without its weights
    shutil.rmtree(merged)
    return figures


def _logit_errors(job: Job, copied: Path, reference: Mapping[str, torch.Tensor]) -> tuple[float, float | None]:
    """Mean distance of logits: of the copy to base + adapter, and of the base in NF4 to the base in 16 bits."""
    stored = QuantizedModel(torch.float32, CheckpointReader(copied), StoredReader(copied), job.config)
    found = stored.logits(job.prompts)["plain"]
    off = float((found - reference["adapted"]).abs().mean())
    if isinstance(job.opened, StoredReader):
        return off, None
    plain, rows = job.before(CheckpointReader(job.base.folder)), job.sources.token_rows
    if isinstance(job.opened, DequantizedReader):
        other = LayerwiseModel(plain, job.base_config, token_rows=rows)
    else:
        other = QuantizedModel(torch.float32, plain, plain, job.base_config, (), None, rows)
    return off, float((other.logits(job.prompts)["plain"] - reference["plain"]).abs().mean())


def judge_nf4(figures: Nf4Figures) -> None:
    """Raise WeightsError where the copy's logits are further off than rounding to NF4 explains."""
    off, usual = figures.logit_error_mean, figures.base_error_mean
    if off is None or usual is None or off <= MAX_OF_THE_BASES_OWN * usual:
        return
    what = "the model in NF4 differs from base + adapter by more than rounding to NF4 explains"
    got = f"mean difference {off:.3g} where rounding the base to NF4 makes {usual:.3g}"
    raise WeightsError(Problem("proof: logits in NF4", what, "merge without --requantize, and report this bug", got))


@dataclass(frozen=True)
class Nf4Copy:
    """What is to be written of a merged 16-bit checkpoint: its matrices in NF4, everything else as it is."""

    merged: CheckpointReader
    matrices: list[Matrix]
    kept: list[str]  # tensors that are copied
    weights: dict[str, tuple[int, ...]]  # shapes by name in the loaded model

    @classmethod
    def of(cls, merged: CheckpointReader, family: Family) -> "Nf4Copy":
        """Of a folder with its `config.json`."""
        matrices, weights = nf4_matrices(merged, family), quantized_weights(merged.config)
        taken = {part.key for matrix in matrices for part in matrix.parts}
        kept = [key for key in merged.keys if key not in taken]
        return cls(merged, matrices, kept, {**weights.linear, **weights.stacks})

    @property
    def specs(self) -> list[TensorSpec]:
        """Everything that is written."""
        infos = [self.merged.info(key) for key in self.kept]
        stored = [spec for name, shape in self.weights.items() for spec in stored_specs(name, shape)]
        return [*(TensorSpec(info.key, info.dtype, info.shape) for info in infos), *stored]

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return sum(spec.nbytes for spec in self.specs)

    def write(self, folder: Path, advance: Callable[[int], object] = lambda _: None) -> None:
        """Write it, a matrix at a time in 4 bits and some values at a time in 16; `advance` is told bytes of these."""
        with CheckpointWriter(folder, self.specs) as writer:
            for key in self.kept:
                for start, stop in blocks(self.merged.info(key)):
                    rows = self.merged.read_rows(key, start, stop)
                    writer.write_rows(key, start, rows)
                    advance(rows.numel() * rows.itemsize)
            for matrix in self.matrices:
                dtype = TORCH_DTYPES[self.merged.info(matrix.parts[0].key).dtype]
                stored = quantize(matrix, self.merged.read_rows, torch.float32)  # exact for all that is written
                if len(self.weights[matrix.weight]) == 3:
                    for name, value in zip(STACK_PARTS, stored.stored, strict=True):
                        writer.write_rows(matrix.weight + name, matrix.expert, value)
                else:
                    for name, value in linear_tensors(matrix.weight, stored, dtype).items():
                        writer.write(name, value)
                advance(matrix.rows * matrix.columns * dtype.itemsize)

    def prove(
        self, folder: Path, outcomes: Mapping[str, Outcome], advance: Callable[[int], object] = lambda _: None
    ) -> dict[str, float | None]:
        """Read what was written and hold every value against the 16-bit one; returns what was lost by part.

        `outcomes` of the merge, by key. Raises WeightsError for a copy that is not one bit for bit, and for a value
        that is further off than rounding to NF4 can bring it.
        """
        stored = StoredReader(folder, torch.float32)
        for key in self.kept:
            if not torch.equal(stored.read(key), self.merged.read(key)):
                raise WeightsError(Problem(key, "tensor was not copied as it is", "report this bug"))
        lost: dict[str, float] = defaultdict(float)
        deltas: dict[str, dict[str, float]] = defaultdict(dict)
        for matrix in self.matrices:
            off = _lost(matrix, self.merged, stored)
            changed = [outcomes[part.key] for part in matrix.parts if part.key in outcomes]
            for outcome in changed[:1]:
                lost[outcome.part] += off
            for outcome in changed:
                deltas[outcome.part][outcome.key] = outcome.delta
            advance(matrix.rows * matrix.columns)
        delta = {part: sum(squares.values()) for part, squares in deltas.items()}
        return {part: math.sqrt(lost[part] / delta[part]) if delta[part] else None for part in sorted(delta)}


def _lost(matrix: Matrix, merged: CheckpointReader, stored: StoredReader) -> float:
    """Square of the norm of what rounding took; WeightsError for a value that rounding cannot have brought there.

    A value goes to the nearest of 16 points times its block's maximum; the maxima, less their mean, go to the nearest
    of 256 points times the largest of 256 of them.
    """
    copy = stored.matrix(matrix.weight, matrix.expert)
    pairs = zip(
        pieces(matrix, merged.read_rows, torch.float32), pieces(copy, stored.read_rows, torch.float32), strict=True
    )
    square, maxima, beyond = 0.0, [], []
    for values, found in pairs:
        off = found - values
        square += float(off.dot(off))
        maximum_Q = _by_block(values).abs().amax(dim=1)
        maxima.append(maximum_Q)
        beyond.append(_by_block(off).abs().amax(dim=1) - _half_step(get_4bit_type("nf4", device="cpu")) * maximum_Q)
    maxima_Q, beyond_Q = torch.cat(maxima), torch.cat(beyond)
    spread_Q = (maxima_Q - maxima_Q.mean()).abs()
    groups = -(-len(spread_Q) // NESTED_BLOCKSIZE)
    padded = torch.nn.functional.pad(spread_Q, (0, groups * NESTED_BLOCKSIZE - len(spread_Q)))
    widest_Q = padded.view(groups, -1).amax(dim=1).repeat_interleave(NESTED_BLOCKSIZE)[: len(spread_Q)]
    allowed_Q = _half_step(create_dynamic_map()) * widest_Q + SLACK * maxima_Q
    if bool((beyond_Q > allowed_Q).any()):
        what = "a value in NF4 is further from the merged one than rounding can bring it"
        got = f"{float((beyond_Q - allowed_Q).max()):.3g} too far"
        raise WeightsError(Problem(f"{matrix.weight}, expert {matrix.expert}", what, "report this bug", got))
    return square


def _by_block(values: torch.Tensor) -> torch.Tensor:
    """Flat values as [Q, 64], the last block filled with zeros."""
    blocks_of = -(-len(values) // BLOCKSIZE)
    return torch.nn.functional.pad(values, (0, blocks_of * BLOCKSIZE - len(values))).view(blocks_of, BLOCKSIZE)


def _half_step(points: torch.Tensor) -> float:
    """How far a value between the outermost points can be from the nearest."""
    return float(points.sort().values.diff().max()) / 2
