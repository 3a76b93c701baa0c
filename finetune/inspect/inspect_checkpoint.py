"""Describe a checkpoint folder: architecture, data types, origin and proof."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.adapters.lineage import REPORT_FILE
from finetune.checkpoint import CheckpointReader, announced_dtype, fingerprint
from finetune.checkpoint.reader import read_json
from finetune.errors import WeightsError
from finetune.inspect.lines import Line, checksum_line, reading, size
from finetune.merge.report import report_lines
from finetune.moe.families import family_of

UPCYCLE_FILE = "upcycle.json"
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # what configurations call the experts


def checkpoint_lines(folder: Path) -> list[Line]:
    """What `finetune inspect` says of a checkpoint."""
    reader = CheckpointReader(folder)
    infos = [reader.info(key) for key in reader.keys]
    found, files = fingerprint(folder), len({info.file for info in infos})
    numbers = "/".join(sorted({info.dtype for info in infos}))
    if (announced := announced_dtype(reader)) is not None:
        numbers += f" (config.json says {announced})"
    stored = "" if files == 1 else f" in {files} files"
    values, nbytes = sum(math.prod(info.shape) for info in infos), sum(info.nbytes for info in infos)
    return [
        ("what", f"checkpoint of a {_model(reader.config)}"),
        ("weights", f"{len(infos)} tensors{stored}, {values / 1e6:,.1f} M values, {numbers}, {size(nbytes)}"),
        ("fingerprint", found),
        checksum_line(folder),
        *_origin(folder, found),
        ("training", _trainable(reader)),
    ]


def _model(config: Mapping[str, Any]) -> str:
    experts = next((config[name] for name in _COUNTS if config.get(name)), 0)
    of_experts = f", {experts} experts, top {config.get('num_experts_per_tok')}" if experts else ""
    layers, hidden = config.get("num_hidden_layers"), config.get("hidden_size")
    return f"{config.get('model_type')}: {layers} layers of {hidden}{of_experts}, vocabulary {config.get('vocab_size')}"


def _origin(folder: Path, found: str) -> list[Line]:
    if (folder / REPORT_FILE).is_file():
        report = read_json(folder / REPORT_FILE)
        with reading(folder / REPORT_FILE, "a merge"):
            return _merged(report, found)
    if (folder / UPCYCLE_FILE).is_file():
        upcycled = read_json(folder / UPCYCLE_FILE)
        with reading(folder / UPCYCLE_FILE, "an upcycling"):
            experts = f"{upcycled['num_experts']} experts, top {upcycled['top_k']}"
            noise = f"noise {upcycled['noise']:g}, seed {upcycled['seed']}"
            return [
                (
                    "made by",
                    f"finetune upcycle {upcycled['moe_finetune']} from {upcycled['source']}: {experts}, {noise}",
                )
            ]
    return [("made by", "not recorded; neither a merge nor an upcycling of this toolkit")]


def _merged(report: Mapping[str, Any], found: str) -> list[Line]:
    if report.get("fingerprint") != found:
        of = f"weights {str(report['fingerprint'])[:12]}" if "fingerprint" in report else "unknown weights"
        return [("made by", f"a merge; but {REPORT_FILE} describes {of}, not these")]
    return [("made by", f"finetune merge into the {report['into']} base {report['base']}"), *report_lines(report)]


def _trainable(reader: CheckpointReader) -> str:
    try:
        family = family_of(str(reader.config.get("model_type")), "config.json")
    except WeightsError as error:
        return "; ".join(problem.what for problem in error.problems)
    return f"lora.targets: {', '.join(family.targets)}"
