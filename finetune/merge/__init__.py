"""Floor 6: adapter + base checkpoint -> full weights, streamed and proven."""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from finetune.checkpoint import CheckpointReader, TensorInfo, TensorSpec, fingerprint, new_folder, require_free_disk
from finetune.errors import Problem, WeightsError
from finetune.files import write_json
from finetune.merge import proof
from finetune.merge.adapter import RECORD_FILE, Adapter, read_adapter
from finetune.merge.biases import fixed_tensors
from finetune.merge.deltas import Delta, plan
from finetune.merge.files import copy_files, end_generation_at, merged_config, side_files
from finetune.merge.logits import LayerwiseModel
from finetune.merge.orders import LAYOUTS
from finetune.merge.report import MergeReport, PartFigures
from finetune.merge.routing import Routing
from finetune.merge.stream import Ledger, output_specs, stream_merged
from finetune.merge.vocabulary import TokenRows, refuse_other_tokenizer, token_rows, vocab_size
from finetune.moe.families import Family, family_of
from finetune.moe.rehearsal import rehearse

__all__ = ["DTYPES", "LAYOUTS", "MergeReport", "merge"]

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
REPORT_FILE = "merge-report.json"


@dataclass(frozen=True)
class _Job:
    """Everything known before the first byte is written."""

    adapter: Adapter
    base: CheckpointReader
    family: Family
    fingerprint: str
    deltas: dict[str, Delta]
    fixed: dict[str, TensorInfo]  # tensors that are copied as they are, wherever they lie
    rows: dict[str, TokenRows]  # matrices of which the adapter holds rows
    config: dict[str, Any]  # of the merged model
    eos: int | None  # of the tokenizer that the adapter was trained with; None where it brings none
    specs: list[TensorSpec]
    dtype: str | None  # "BF16"; None leaves every tensor in its own
    files: list[Path]
    prompts: list[torch.Tensor]
    show_progress: bool

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


def merge(
    adapter: Path,
    output: Path,
    *,
    base: Path | None = None,
    dtype: str | None = None,
    layout: str | None = None,
    show_progress: bool = True,
) -> MergeReport:
    """Write base + adapter to `output`, and prove it before the folder gets its name.

    `base` replaces the recorded location only: its fingerprint must still be the recorded one. `dtype`: one of DTYPES.
    `layout`: one of LAYOUTS, for an adapter whose files do not say in which order its experts' factors lie.
    Raises WeightsError for anything that does not fit and for a proof that fails; then there is no output.
    """
    job = _prepare(Path(adapter), base, dtype, layout, show_progress)
    require_free_disk(Path(output), job.nbytes)
    with new_folder(output) as folder:
        started = time.monotonic()
        with _bar(job, "merge", "B", sum(job.base.info(key).nbytes for key in job.base.keys)) as bar:
            ledger = stream_merged(job.base, job.deltas, folder, job.specs, job.fixed, job.rows, bar.update)
        streamed = time.monotonic()
        copy_files(job.files, folder)
        end_generation_at(folder, job.eos)
        report = _prove(job, ledger, folder, Path(output), started, streamed)
        write_json(folder / REPORT_FILE, report.as_dict())
        # Last of all: without it no reader takes the folder for a model.
        write_json(folder / "config.json", job.config)
    return report


def _prepare(
    adapter_folder: Path, base: Path | None, dtype: str | None, layout: str | None, show_progress: bool
) -> _Job:
    adapter = read_adapter(adapter_folder, layout)
    folder = _base_folder(adapter, base)
    reader = CheckpointReader(folder)
    family = family_of(str(reader.config.get("model_type")), str(folder / "config.json"))
    found = fingerprint(folder)
    if adapter.base_fingerprint not in (None, found):
        do = "give the base that the adapter was trained on with --base"
        got = f"{found[:12]} where the adapter records {str(adapter.base_fingerprint)[:12]}"
        raise WeightsError(Problem(str(folder), "base fingerprint differs", do, got))
    rehearse(reader, family.transformers_class(), load_in_4bit=False)
    deltas = plan(reader, adapter, family)
    rows = token_rows(reader, adapter, deltas)
    files = side_files(folder, adapter.folder)
    tokenizer = _tokenizer(files[0].parent, vocab_size(reader, rows), adapter)
    eos = tokenizer.eos_token_id if files[0].parent == adapter.folder else None
    fixed = fixed_tensors(reader, adapter.folder, family)
    output_dtype = None if dtype is None else DTYPES[dtype]
    return _Job(
        adapter=adapter,
        base=reader,
        family=family,
        fingerprint=found,
        deltas=deltas,
        fixed=fixed,
        rows=rows,
        config=merged_config(reader.config, output_dtype, vocab_size(reader, rows), eos),
        eos=eos,
        specs=output_specs(reader, output_dtype, fixed, rows),
        dtype=output_dtype,
        files=files,
        prompts=proof.prompt_ids(tokenizer, _tokens(rows)),
        show_progress=show_progress,
    )


def _tokenizer(folder: Path, size: int, adapter: Adapter) -> Any:
    """The merged model's tokenizer; refused unless it fits the model and the adapter."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    refuse_other_tokenizer(tokenizer, str(folder), size, adapter)
    return tokenizer


def _tokens(rows: Mapping[str, TokenRows]) -> list[int]:
    """The tokens of which the adapter holds rows."""
    return sorted({token for each in rows.values() for token in each.tokens})


def _base_folder(adapter: Adapter, base: Path | None) -> Path:
    if base is not None:
        return Path(base)
    location = adapter.base_location
    if location is None:
        do = "name the base checkpoint with --base"
        raise WeightsError(Problem(str(adapter.folder), f"does not record its base ({RECORD_FILE})", do))
    if Path(location).is_dir():
        return Path(location)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:  # A name on the hub: only what was downloaded for training, never a network call.
        return Path(snapshot_download(location, revision=adapter.base_revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        do = "name the folder of the base checkpoint with --base"
        where = str(adapter.folder / RECORD_FILE)
        raise WeightsError(Problem(where, "the recorded base is not on this machine", do, got=location)) from error


def _prove(job: _Job, ledger: Ledger, folder: Path, output: Path, started: float, streamed: float) -> MergeReport:
    """All proofs, cheapest first; the first that fails raises WeightsError."""
    merged = CheckpointReader(folder)
    used = proof.prove_usage(ledger, job.adapter, job.deltas)
    tensors = proof.prove_keys(merged, job.specs)
    moved = proof.prove_copies(job.base, merged, job.fixed)
    proof.prove_rows(job.base, merged, job.rows)
    with _bar(job, "compare", "B", sum(job.base.info(key).nbytes for key in job.base.keys)) as bar:
        changed = proof.prove_changes(job.base, merged, ledger.targeted | moved, job.rows, bar.update)
    base_config = {**job.base.config, "vocab_size": job.config["vocab_size"]}
    routing = None if job.family.moe is None else Routing(job.family.moe.experts_module)
    base_model = LayerwiseModel(job.base, base_config, job.adapter, routing, job.rows)
    merged_model = LayerwiseModel(merged, job.config, routing=routing)
    with _bar(job, "prove", "layer", base_model.num_layers + merged_model.num_layers) as bar:
        figures = proof.measure_logits(base_model, merged_model, job.prompts, _tokens(job.rows), bar.update)
    dtypes = tuple(sorted({merged.info(key).dtype for key in merged.keys}))
    proof.judge_logits(figures, float32=dtypes == ("F32",), rounding=_rounding(ledger))
    return MergeReport(
        adapter=str(job.adapter.folder),
        base=str(job.base.folder),
        base_fingerprint=job.fingerprint,
        fingerprint_recorded=job.adapter.base_fingerprint is not None,
        output=str(output),
        dtypes=dtypes,
        nbytes=job.nbytes,
        adapter_tensors=used + len(job.adapter.rows),
        tensors=tensors,
        targeted=len(job.deltas) + len(moved) + len(job.rows),
        changed=changed + len(job.rows),
        moved_biases=len(moved),
        added_tokens=len(_tokens(job.rows)),
        parts=_part_figures(job.deltas, ledger),
        logits=figures,
        stream_seconds=round(streamed - started, 3),
        proof_seconds=round(time.monotonic() - streamed, 3),
    )


def _part_figures(deltas: Mapping[str, Delta], ledger: Ledger) -> dict[str, PartFigures]:
    counts = Counter(delta.part for delta in deltas.values())
    return {
        part: PartFigures(
            tensors=counts[part],
            relative_delta=math.sqrt(norms.delta / norms.base) if norms.base else 0.0,
            relative_rounding=math.sqrt(norms.rounding / norms.delta) if norms.delta else None,
        )
        for part, norms in sorted(ledger.norms.items())
    }


def _rounding(ledger: Ledger) -> float:
    """Norm of what rounding lost over the norm of the delta, over all parts; 0 without any delta."""
    delta = sum(norms.delta for norms in ledger.norms.values())
    return math.sqrt(sum(norms.rounding for norms in ledger.norms.values()) / delta) if delta else 0.0


@contextmanager
def _bar(job: _Job, name: str, unit: str, total: int) -> "Iterator[tqdm[Any]]":
    with tqdm(
        total=total, desc=name, unit=unit, unit_scale=unit == "B", unit_divisor=1024, disable=not job.show_progress
    ) as bar:
        yield bar
