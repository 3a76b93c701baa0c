"""Describe an adapter folder: its base, its training, and whether it can be merged and proven. Exports, too."""

import json
import math
from pathlib import Path

from finetune.adapters.adapter import CONFIG_FILE, EXPORT_FILE, WEIGHTS_FILE, Adapter, read_adapter
from finetune.adapters.record import RECORD_FILE, AdapterRecord
from finetune.checkpoint.reader import read_header, read_json
from finetune.errors import WeightsError
from finetune.inspect.lines import Line, checksum_line, figures, named, reading, recipe_lines, size
from finetune.merge.job import Request, prepare

_PROGRAMS = {"vllm": "vLLM"}


def exported_lines(folder: Path, tensors: Line) -> list[Line]:
    """What `finetune inspect` says of an export; `tensors`: the line about its weights."""
    file = folder / EXPORT_FILE
    exported = read_json(file)
    with reading(file, "an export"):
        program = _PROGRAMS.get(exported["format"], exported["format"])
        adapter, rank = exported["adapter"], exported["max_lora_rank"]
        return [
            ("what", f"LoRA adapter, exported for {program}: r {exported['r']}, needs --max-lora-rank {rank}"),
            tensors,
            checksum_line(folder),
            ("made from", f"{adapter['name_or_path']}, SHA-256 {adapter['sha256'][:12]}"),
            ("base", named(exported["base"])),
            ("merge", "merge the adapter that it was made from"),
        ]


STATE_FILE = "trainer_state.json"
_SHOWN_PROBLEMS = 3


def adapter_lines(folder: Path) -> list[Line]:
    """What `finetune inspect` says of an adapter."""
    with reading(folder / CONFIG_FILE, "training"):
        adapter = read_adapter(folder)
    record = adapter.record
    infos = read_header(folder / WEIGHTS_FILE).values()
    count = sum(math.prod(info.shape) for info in infos)
    nbytes = sum(info.nbytes for info in infos)
    dtypes = "/".join(sorted({info.dtype for info in infos}))
    tensors = ("tensors", f"{len(infos)}, {count / 1e6:.2f} M parameters, {dtypes}, {size(nbytes)}")
    if (folder / EXPORT_FILE).is_file():
        return exported_lines(folder, tensors)
    state = folder / STATE_FILE
    with reading(folder / RECORD_FILE, "training"):
        recorded: list[Line] = [
            ("base", named(record.base.as_dict()) if record.base else _unrecorded(adapter)),
            *_record_lines(adapter, record),
        ]
    return [
        ("what", _of_a_run(state) if state.is_file() else f"LoRA adapter, {_maker(adapter, record)}"),
        tensors,
        ("weights", f"SHA-256 {adapter.digest()}"),
        checksum_line(folder),
        *recorded,
        ("experts' factors", _order(adapter)),
        *_extras(adapter),
        *_effect(adapter),
        ("merge", _fits(adapter)),
    ]


def _of_a_run(state: Path) -> str:
    """What a checkpoint is."""
    from finetune.run import RunFolder

    step, run = read_json(state).get("global_step", "that is not recorded"), RunFolder(state.absolute().parent.parent)
    finished = f"its finished adapter is in {run.adapter}" if run.adapter.is_dir() else "the run is not finished"
    return f"checkpoint of a run at step {step}; {finished}"


def _maker(adapter: Adapter, record: AdapterRecord) -> str:
    if record.versions:
        made = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        return f"trained by this toolkit ({made})"
    tool = "Unsloth" if adapter.by_unsloth else "another tool"
    version = adapter.settings.get("peft_version")
    return f"made by {tool}" + (f" with peft {version}" if version else "; its peft version is not recorded")


def _unrecorded(adapter: Adapter) -> str:
    name = adapter.settings.get("base_model_name_or_path")
    return "not recorded" + (f"; its settings name {name}, without a fingerprint" if name else "")


def _record_lines(adapter: Adapter, record: AdapterRecord) -> list[Line]:
    if not record.recipe:
        return [("LoRA", f"r {adapter.settings['r']}, lora_alpha {adapter.settings['lora_alpha']:g}")]
    initial, chosen, template = record.adapter, record.experts, record.template_sha256
    quantized = "NF4" if record.quantization == "nf4" else "not quantised"
    return [
        ("base in training", f"{quantized}, computed in {record.dtype or 'a dtype that is not recorded'}"),
        *([("went on from", f"{initial.name_or_path}, SHA-256 {initial.sha256[:12]}")] if initial else []),
        *recipe_lines(record.recipe),
        *([("experts", f"chosen by score, {len(chosen)} entries in {RECORD_FILE}")] if chosen else []),
        *[(f"last {split}", figures(metrics)) for split, metrics in (record.metrics or {}).items()],
        *([("chat template", f"SHA-256 {template[:12]}")] if template else []),
        *([("its variables", json.dumps(record.template_args))] if record.template_args else []),
    ]


def _order(adapter: Adapter) -> str:
    if adapter.layout_recorded:
        return "A expert-major, B rank-major (PEFT's), recorded"
    if adapter.expert_major is not None:
        return f"B {'expert' if adapter.expert_major else 'rank'}-major, declared in the settings"
    return "not declared; the merge says what it can tell from shapes and peft version"


def _extras(adapter: Adapter) -> list[Line]:
    return [
        *([("added tokens", ", ".join(adapter.added_tokens))] if adapter.added_tokens else []),
        *([("whole tensors", ", ".join(adapter.whole))] if adapter.whole else []),
        *([("router biases", "moved in training; they lie beside the factors")] if adapter.has_biases else []),
    ]


def _effect(adapter: Adapter) -> list[Line]:
    """A line about targets that the adapter leaves as they are."""
    if not (idle := adapter.without_effect()):
        return []
    if len(idle) == len(adapter.pairs):
        return [("effect", "none on any weight: every B is zero, as before training")]
    more = f" and {len(idle) - _SHOWN_PROBLEMS} more" if len(idle) > _SHOWN_PROBLEMS else ""
    shown = ", ".join(idle[:_SHOWN_PROBLEMS]) + more
    return [("effect", f"none on {len(idle)} of {len(adapter.pairs)} targets, whose B is zero: {shown}")]


def _fits(adapter: Adapter) -> str:
    """Whether everything that a merge needs is here and fits, by the headers."""
    try:
        job = prepare(Request((adapter.folder,), (1.0,)))
    except WeightsError as error:
        problems = [str(problem) for problem in error.problems]
        more = len(problems) - _SHOWN_PROBLEMS
        shown = problems[:_SHOWN_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        return "cannot be merged: " + "; ".join(shown)
    changes = f"{len(job.sources.changes)} of its {len(job.specs)} tensors would change"
    return f"can be merged: the base is in {job.base.folder}; {changes}; weights were not read"
