"""Base checkpoint + adapters -> full weights, streamed and proven."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.adapters.lineage import REPORT_FILE
from finetune.adapters.orders import LAYOUTS
from finetune.checkpoint import (
    CheckpointReader,
    fingerprint,
    listed_bytes,
    new_folder,
    require_free_disk,
    sync_files,
    verify_sums,
    write_sums,
)
from finetune.files import as_json, write_json, write_text
from finetune.merge import proof
from finetune.merge.files import copy_files, end_generation_at
from finetune.merge.job import DTYPES, Job, Request, prepare
from finetune.merge.journal import Journal
from finetune.merge.ledger import Ledger
from finetune.merge.logits import LayerwiseModel
from finetune.merge.report import MergeReport, Proof, part_figures
from finetune.merge.routing import Routing
from finetune.merge.stream import stream_merged

__all__ = ["DTYPES", "LAYOUTS", "REPORT_FILE", "MergeReport", "merge"]


def merge(
    adapters: Path | Sequence[Path],
    output: Path,
    *,
    weights: Sequence[float] | None = None,
    base: Path | None = None,
    dtype: str | None = None,
    layouts: Sequence[str] | None = None,
    prove: bool = True,
    prompts: Path | None = None,
    resume: bool = False,
    show_progress: bool = True,
) -> MergeReport:
    """Write base + adapters to `output`, and prove it before the folder gets its name.

    `weights`: of the adapters, 1 each by default. `base` replaces the recorded location only: its fingerprint must
    still be the recorded one. `dtype`: one of DTYPES. `layouts`: of LAYOUTS, one for each adapter, the order of its
    experts' factors where its files do not say. `prove` False leaves out what reads the output again. `prompts`:
    a text file, one a line, in place of the fixed ones. `resume`: go on from what a killed merge into `output` left.
    Raises WeightsError for anything that does not fit and for a proof that fails; then there is no output.
    """
    given = (adapters,) if isinstance(adapters, Path) else tuple(adapters)
    request = Request(given, tuple(weights or [1.0] * len(given)), base, dtype, prompts, tuple(layouts or ()))
    job = prepare(request, lambda folder: _verify(folder, show_progress))
    require_free_disk(Path(output), job.nbytes, Path(output).parent / f".{Path(output).name}.partial")
    if show_progress:
        print(_announcement(job, Path(output)), flush=True)
    with new_folder(output, resumable=True, resume=resume) as folder:
        started = time.monotonic()
        journal = Journal(folder, job.identity(), resume)
        with _bar("merge", "B", job.nbytes, show_progress) as bar:
            ledger = stream_merged(job.sources, folder, job.specs, journal, bar.update)
        streamed = time.monotonic()
        sync_files(folder)
        copy_files(job.files, folder)
        end_generation_at(folder, job.eos)
        proven = _prove(job, ledger, folder, prove, show_progress)
        report = _report(job, ledger, proven, folder, Path(output), streamed - started, time.monotonic() - streamed)
        write_json(folder / REPORT_FILE, report.as_dict())
        config = as_json(job.config)
        with _bar("checksums", "B", job.nbytes, show_progress) as bar:
            write_sums(folder, {"config.json": config}, bar.update)
        journal.remove()
        # Last of all: without it no reader takes the folder for a model.
        write_text(folder / "config.json", config)
    return report


def _verify(base: Path, show_progress: bool) -> None:
    with _bar("verify", "B", listed_bytes(base), show_progress) as bar:
        verify_sums(base, bar.update)


def _announcement(job: Job, output: Path) -> str:
    changes = f"{len(job.sources.changes)} of {len(job.specs)} tensors change"
    return f"merge: {changes}; {job.nbytes / 2**30:.2f} GiB go to {output}"


def _prove(job: Job, ledger: Ledger, folder: Path, whole: bool, show_progress: bool) -> Proof:
    """All proofs, cheapest first; the first that fails raises WeightsError. Not `whole`: those of the headers."""
    merged, sources = CheckpointReader(folder), job.sources
    used = proof.prove_usage(ledger, [each.adapter for each in job.adapters], sources.changes)
    tensors = proof.prove_keys(merged, job.specs)
    if not whole:
        return Proof(used, tensors)
    moved = proof.prove_copies(job.base, merged, sources.fixed)
    proof.prove_rows(job.base, merged, sources.token_rows)
    with _bar("compare", "B", sum(job.base.info(key).nbytes for key in job.base.keys), show_progress) as bar:
        changed = proof.prove_changes(job.base, merged, ledger.targeted | moved, sources.token_rows, bar.update)
    routing = None if job.family.moe is None else Routing(job.family.moe.experts_module)
    base_config = {**job.base.config, "vocab_size": job.config["vocab_size"]}
    base_model = LayerwiseModel(job.trained_on, base_config, job.adapters, routing, sources.token_rows)
    merged_model = LayerwiseModel(merged, job.config, routing=routing)
    with _bar("prove", "layer", base_model.num_layers + merged_model.num_layers, show_progress) as bar:
        figures = proof.measure_logits(base_model, merged_model, job.prompts, job.added_tokens, bar.update)
    float32 = all(merged.info(key).dtype == "F32" for key in merged.keys)
    proof.judge_logits(figures, float32=float32, rounding=proof.rounding(ledger.outcomes.values()))
    return Proof(used, tensors, changed + len(sources.token_rows), len(moved), figures)


def _report(
    job: Job, ledger: Ledger, proven: Proof, folder: Path, output: Path, stream_seconds: float, proof_seconds: float
) -> MergeReport:
    merged = CheckpointReader(folder)
    return MergeReport(
        adapters=tuple(
            {
                "name_or_path": str(each.adapter.folder),
                "sha256": each.digest,
                "weight": each.weight,
                "base_recorded": each.adapter.base_fingerprint is not None,
            }
            for each in job.adapters
        ),
        base=str(job.base.folder),
        base_fingerprint=job.fingerprint,
        into="original",
        output=str(output),
        fingerprint=fingerprint(folder),
        dtypes=tuple(sorted({merged.info(key).dtype for key in merged.keys})),
        nbytes=job.nbytes,
        targeted=len(job.sources.changes) + (proven.moved_biases or 0) + len(job.sources.token_rows),
        added_tokens=len(job.added_tokens),
        whole_tensors=job.whole_tensors,
        untied=job.untied,
        parts=part_figures(ledger),
        proof=proven,
        stream_seconds=round(stream_seconds, 3),
        proof_seconds=round(proof_seconds, 3),
    )


@contextmanager
def _bar(name: str, unit: str, total: int, show: bool) -> "Iterator[tqdm[Any]]":
    with tqdm(total=total, desc=name, unit=unit, unit_scale=unit == "B", unit_divisor=1024, disable=not show) as bar:
        yield bar
