"""`--compare`: which base to merge into, measured on rows instead of guessed.

An adapter that was trained on a base in 4 bits has seen other weights than the 16-bit base has. Adding it to those of
the 16-bit base (`original`) brings back what rounding took, which is usually better and is not what was trained; adding
it to those that training saw (`dequantized`) is what was trained. Both merges are run on the same rows, in the memory
of one layer and without writing either of them.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import kl_div, log_softmax, nll_loss
from torch.nn.utils.rnn import pad_sequence

from finetune.adapters.deltas import Change
from finetune.checkpoint import CheckpointReader
from finetune.errors import WeightsError
from finetune.merge.base import reference_model, trained_dtype
from finetune.merge.compare_rows import IGNORED, Rows
from finetune.merge.dequantized import DequantizedReader
from finetune.merge.job import Job
from finetune.merge.logits import LayerwiseModel
from finetune.merge.report import Candidate, Comparison
from finetune.merge.sources import Sources
from finetune.merge.view import MergedReader

BATCH_TOKENS = 2048  # that are run through a layer together


@dataclass
class _Sums:
    """Over supervised tokens, fp64."""

    loss: float = 0.0
    kl: float = 0.0


def compare(job: Job, data: str, rows: Rows, advance: Callable[[int], object] = lambda _: None) -> Comparison:
    """Loss and KL of the merges into both bases against base + adapter as trained; `advance` is told of each layer."""
    bases, why = _bases(job)
    merges = {name: _merge_into(job, base) for name, base in bases.items()}
    opened = bases.get("dequantized", job.opened)
    trained = reference_model(opened, job.before, job.base_config, job.adapters, None, job.sources.token_rows)
    models = {name: LayerwiseModel(merged, job.config) for name, merged in merges.items()}
    batches = list(_batches(rows))
    ids = [pad_sequence([ids_T for ids_T, _ in batch], batch_first=True) for batch in batches]
    reference = trained.hidden(ids, advance)
    states = {name: model.hidden(ids, advance) for name, model in models.items()}
    head, heads = trained.head(), {name: model.head() for name, model in models.items()}
    base, found, tokens = _Sums(), {name: _Sums() for name in models}, 0
    for number, batch in enumerate(batches):
        for row, (_, labels) in enumerate(batch):
            places = (labels[1:] != IGNORED).nonzero()[:, 0]
            wanted = labels[places + 1]
            expected = _log_probabilities(head, reference[number][row], places)
            base.loss += float(nll_loss(expected, wanted, reduction="sum"))
            tokens += len(places)
            for name, sums in found.items():
                merged = _log_probabilities(heads[name], states[name][number][row], places)
                sums.loss += float(nll_loss(merged, wanted, reduction="sum"))
                sums.kl += divergence(expected, merged)
    into = {name: Candidate(sums.loss / tokens, sums.kl / tokens) for name, sums in found.items()}
    shift = _shift(opened, merges, job.sources.changes)
    return Comparison(data, len(rows), tokens, base.loss / tokens, into, shift, advice(into, why))


def _batches(rows: Rows) -> Iterator[Rows]:
    """Rows of like length together. What fills up the shorter ones stands behind them, where nothing looks at it."""
    batch: list[tuple[torch.Tensor, torch.Tensor]] = []
    for row in sorted(rows, key=lambda row: len(row[0])):
        if batch and (len(batch) + 1) * len(row[0]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _log_probabilities(
    head: Callable[[torch.Tensor], torch.Tensor], state_TH: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """Of the tokens that follow `places`, fp64 [n, V]."""
    return log_softmax(head(state_TH[None, places]).double(), dim=-1)


def divergence(trained: torch.Tensor, merged: torch.Tensor) -> float:
    """Sum over tokens of KL(trained || merged), from log-probabilities [n, V]."""
    return float(kl_div(merged, trained, reduction="sum", log_target=True))


def layers_to_run(job: Job) -> int:
    """How often `compare` advances."""
    return (1 + len(_bases(job)[0])) * int(LayerwiseModel(job.base, job.base_config).num_layers)


def _bases(job: Job) -> tuple[dict[str, CheckpointReader], str | None]:
    """The bases that can be merged into, by name, and why there is but one."""
    plain = CheckpointReader(job.base.folder)
    try:
        dtype = trained_dtype(job.adapters, job.fingerprint)
    except WeightsError as error:
        return {"original": job.opened}, error.problems[0].what
    return {"original": plain, "dequantized": DequantizedReader(plain.folder, job.family, dtype)}, None


def _merge_into(job: Job, base: CheckpointReader) -> MergedReader:
    sources, beside = job.sources, job.over(CheckpointReader(base.folder))
    return MergedReader(Sources(job.over(base), sources.changes, sources.fixed, sources.token_rows), job.specs, beside)


def _shift(
    opened: CheckpointReader, merges: Mapping[str, MergedReader], changes: Mapping[str, Change]
) -> dict[str, float]:
    """By part, how far NF4 moves the base over how far the adapter does, over all tensors that were quantised."""
    if not isinstance(opened, DequantizedReader):
        return {}
    seen = merges["dequantized"]
    shift: dict[str, float] = {}
    delta: dict[str, float] = {}
    for key in seen.shift.keys() & opened.quantized:
        part = changes[key].part
        shift[part] = shift.get(part, 0.0) + seen.shift[key]
        delta[part] = delta.get(part, 0.0) + seen.delta[key]
    return {part: math.sqrt(shift[part] / delta[part]) for part in sorted(shift) if delta[part]}


def advice(into: Mapping[str, Candidate], why: str | None) -> str:
    """One line that follows from the figures."""
    if why is not None:
        return f"only into {next(iter(into))} was measured: {why}"
    by_loss, by_kl = (min(into, key=lambda name: getattr(into[name], what)) for what in ("loss", "kl"))
    if by_loss == by_kl:
        return f"merge --into {by_loss}: lower loss on these rows, and closer to what was trained"
    return f"--into {by_loss} has the lower loss on these rows, --into {by_kl} is closer to what was trained"
