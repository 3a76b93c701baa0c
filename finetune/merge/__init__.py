"""Merge adapters into a base checkpoint, streamed from disk to disk, and prove the result."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from finetune.adapters.factor_layouts import LAYOUTS
from finetune.adapters.lineage import REPORT_FILE
from finetune.adapters.locate import adapter_folder
from finetune.checkpoint import (
    CheckpointReader,
    announced_dtype,
    check_output_free,
    fingerprint,
    listed_bytes,
    new_folder,
    sync_files,
    verify_sums,
    write_sums,
)
from finetune.errors import Problem, WeightsError
from finetune.files import as_json, require_free_disk, write_json, write_text
from finetune.merge import proof
from finetune.merge.base_weights import INTO, reference_model
from finetune.merge.copied_files import copy_files, write_generation
from finetune.merge.job import DTYPES, Job, Request, prepare
from finetune.merge.report import (
    COMPARE_ROWS,
    TIMES_FILE,
    Comparison,
    MergeReport,
    Proof,
    part_figures,
    report_card,
)
from finetune.merge.routing_replay import Routing
from finetune.merge.stream import TensorLog, stream_merged

if TYPE_CHECKING:
    from finetune.merge.compare import Rows

__all__ = ["DTYPES", "INTO", "LAYOUTS", "REPORT_FILE", "MergeReport", "merge"]


def merge(
    adapters: Path | Sequence[Path],
    output: Path,
    *,
    weights: Sequence[float] | None = None,
    base: Path | None = None,
    dtype: str | None = None,
    into: str = "original",
    layouts: Sequence[str] | None = None,
    prove: bool = True,
    prompts: Path | None = None,
    compare: Path | None = None,
    compare_rows: int = COMPARE_ROWS,
    show_progress: bool = True,
) -> MergeReport:
    """Write base + adapters to `output`, and prove it before the folder gets its name.

    `adapters`: folders of adapters, runs, `RUN/checkpoint-N` or `RUN@best`. `weights`: of the adapters, 1 each by
    default. `base` replaces the recorded location only: its fingerprint must still be the recorded one. `dtype`: one of
    DTYPES. `into`: "dequantized" adds to the values that 4-bit training saw.
    `layouts`: of LAYOUTS, one for each adapter, the order of its experts' factors where its files do not say. `prove`
    False leaves out what reads the output again. `prompts`: a text file, one a line, in place of the fixed ones.
    `compare`: a data file, on the first `compare_rows` rows of which merges into both bases are measured. Raises
    WeightsError for anything that does not fit and for a proof that fails; then there is no output.
    """
    check_output_free(Path(output).absolute())
    _check_options(prompts, prove, compare_rows)
    given = tuple(map(adapter_folder, (adapters,) if isinstance(adapters, Path) else adapters))
    factors = tuple(weights or [1.0] * len(given))
    request = Request(given, factors, base, dtype, prompts, tuple(layouts or ()), into)
    job = prepare(request, lambda folder: _verify(folder, show_progress))
    rows = [] if compare is None else _rows(compare, compare_rows, given[-1], job.files[0].parent)
    with new_folder(output, job.nbytes) as folder:
        _require_disk(job, Path(output), show_progress)
        started = time.monotonic()
        with _bar("merge", "B", job.nbytes, show_progress) as bar:
            log = stream_merged(job.sources, folder, job.specs, bar.update)
        streamed = time.monotonic()
        sync_files(folder)
        copy_files(job.files, folder)
        write_generation(folder, job.generation)
        proven = _prove(job, log, folder, prove, show_progress)
        compared = _compare(job, str(compare), rows, show_progress) if rows else None
        report = _report(job, log, proven, compared, folder, Path(output), started, streamed)
        _complete(folder, job, report, show_progress)
    return report


def _check_options(prompts: Path | None, prove: bool, compare_rows: int) -> None:
    """Raise WeightsError for options that would do nothing."""
    if prompts is not None and not prove:
        raise WeightsError(Problem("--prompts", "has no effect with --no-proof", "leave out one of the two"))
    if compare_rows < 1:
        do = "give a number of rows, 1 or more"
        raise WeightsError(Problem("--compare-rows", "must be at least 1", do, str(compare_rows)))


def _complete(folder: Path, job: Job, report: MergeReport, show_progress: bool) -> None:
    """Write what makes the folder a model."""
    config = as_json(job.config)
    write_json(folder / REPORT_FILE, report.as_dict())
    records = [weighted.adapter.record.as_dict() for weighted in job.adapters]
    write_text(folder / "README.md", report_card(report.as_dict(), records, report.output))
    with _bar("checksums", "B", report.nbytes, show_progress) as bar:
        write_sums(folder, {"config.json": config}, bar.update)
    write_json(folder / TIMES_FILE, report.times())  # after the sums, which are the same for every such merge
    # Last of all: without it no reader takes the folder for a model.
    write_text(folder / "config.json", config)


def _rows(data: Path, count: int, adapter: Path, tokenizer: Path) -> "Rows":
    from finetune.merge.compare import compare_rows

    return compare_rows(data, count, adapter, tokenizer)


def _compare(job: Job, data: str, rows: "Rows", show_progress: bool) -> Comparison:
    from finetune.merge.compare import compare, layers_to_run

    with _bar("measure", "layer", layers_to_run(job), show_progress) as bar:
        return compare(job, data, rows, bar.update)


def _require_disk(job: Job, output: Path, show_progress: bool) -> None:
    """Say what goes where, and refuse where there is no space for it."""
    require_free_disk(output, job.nbytes)
    if show_progress:
        print(_announcement(job, output), flush=True)


def _verify(base: Path, show_progress: bool) -> None:
    with _bar("verify", "B", listed_bytes(base), show_progress) as bar:
        verify_sums(base, bar.update)


def _announcement(job: Job, output: Path) -> str:
    changes = f"{len(job.sources.changes)} of {len(job.specs)} tensors change"
    announced = announced_dtype(job.opened)
    stored = "" if announced is None else f"; the base's config.json says {announced}, and no matrix is stored so"
    return f"merge: {changes}; {job.nbytes / 2**30:.2f} GiB go to {output}{stored}"


def _prove(job: Job, log: TensorLog, folder: Path, whole: bool, show_progress: bool) -> Proof:
    """All proofs, cheapest first; the first that fails raises WeightsError. Not `whole`: those of the headers."""
    from finetune.merge.layerwise import LayerwiseModel

    merged, sources = CheckpointReader(folder), job.sources
    used = proof.prove_usage(log, [weighted.adapter for weighted in job.adapters], sources.changes)
    tensors = proof.prove_keys(merged, job.specs)
    if not whole:
        return Proof(used, tensors)
    moved = proof.prove_copies(job.base, merged, sources.fixed)
    proof.prove_rows(job.base, merged, sources.token_rows)
    with _bar("compare", "B", sum(job.base.info(key).nbytes for key in job.base.keys), show_progress) as bar:
        changed = proof.prove_changes(job.base, merged, log.targeted | moved, sources.token_rows, bar.update)
    routing = None if job.family.moe is None else Routing(job.family.moe.experts_module)
    base_model = reference_model(job.opened, job.before, job.base_config, job.adapters, routing, sources.token_rows)
    merged_model = LayerwiseModel(merged, job.config, routing=routing)
    with _bar("prove", "layer", base_model.num_layers + merged_model.num_layers, show_progress) as bar:
        reference = base_model.logits(job.prompts, bar.update)
        figures = proof.measure_logits(reference, merged_model, job.prompts, job.added_tokens, bar.update)
    float32 = all(merged.info(key).dtype == "F32" for key in merged.keys)
    proof.judge_logits(figures, float32=float32, rounding=proof.rounding(log.results.values()))
    return Proof(used, tensors, changed + len(sources.token_rows), len(moved), figures)


def _report(
    job: Job,
    log: TensorLog,
    proven: Proof,
    compared: Comparison | None,
    folder: Path,
    output: Path,
    started: float,
    streamed: float,
) -> MergeReport:
    return MergeReport(
        adapters=tuple(
            {
                "name_or_path": str(weighted.adapter.folder),
                "sha256": weighted.digest,
                "template_day": weighted.adapter.record.template_day,
                **_template_args(weighted.adapter.record.template_args),
                "weight": weighted.weight,
                "base_recorded": weighted.adapter.base_fingerprint is not None,
            }
            for weighted in job.adapters
        ),
        base=str(job.base.folder),
        base_fingerprint=job.fingerprint,
        into=job.into,
        through_nf4=len(job.opened.quantized),
        output=str(output),
        fingerprint=fingerprint(folder),
        dtypes=tuple(sorted({spec.dtype for spec in job.specs})),
        nbytes=job.nbytes,
        targeted=len(job.sources.changes) + (proven.moved_biases or 0) + len(job.sources.token_rows),
        added_tokens=len(job.added_tokens),
        whole_tensors=job.whole_tensors,
        untied=job.untied,
        parts=part_figures(log),
        proof=proven,
        compare=compared,
        stream_seconds=round(streamed - started, 3),
        proof_seconds=round(time.monotonic() - streamed, 3),
    )


def _template_args(args: dict[str, Any] | None) -> dict[str, Any]:
    """What the report says about an adapter that was trained with variables of the chat template."""
    return {"template_args": args} if args else {}


@contextmanager
def _bar(name: str, unit: str, total: int, show: bool) -> "Iterator[tqdm[Any]]":
    with tqdm(total=total, desc=name, unit=unit, unit_scale=unit == "B", unit_divisor=1024, disable=not show) as bar:
        yield bar
