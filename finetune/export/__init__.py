"""Export an adapter or a merged model to the format of another program."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.adapters.adapter import CONFIG_FILE, EXPORT_FILE, WEIGHTS_FILE, Adapter, read_adapter
from finetune.adapters.lineage import Weighted, check_related
from finetune.adapters.locate import adapter_folder
from finetune.adapters.record import RECORD_FILE
from finetune.cards import vllm_card
from finetune.checkpoint import (
    CheckpointReader,
    fingerprint,
    forward_settings,
    new_folder,
    temporary_folder,
    verify_sums,
    write_sums,
)
from finetune.errors import Problem, WeightsError
from finetune.export import gguf, peft, vllm
from finetune.files import disk_named, write_json, write_text
from finetune.generation_config import stop_ids
from finetune.merge import merge
from finetune.merge.job import base_folder
from finetune.moe.families import family_of

__all__ = ["FORMATS", "Exported", "export"]

FORMATS = ("peft", "vllm", "gguf")
_MODEL_CONFIG = "config.json"


@dataclass(frozen=True)
class Exported:
    """What was written, and lines that say how it is used."""

    output: Path
    lines: tuple[str, ...]


def export(
    source: Path,
    output: Path,
    form: str,
    *,
    base: Path | None = None,
    layout: str | None = None,
    outtype: str | None = None,
) -> Exported:
    """Write `source` to `output` as one of FORMATS.

    `source`: an adapter folder, a run, `RUN/checkpoint-N` or `RUN@best`; for gguf also a folder of a whole model.
    `base` replaces the recorded location of the adapter's base, whose fingerprint must still be the recorded one.
    `layout`: the order of its experts' factors, where its files do not say (one of the merge's LAYOUTS). `outtype` of
    gguf: one of its OUTTYPES, by default the model's own. Raises WeightsError for everything that does not fit; then
    there is no output.
    """
    source, output = adapter_folder(source), Path(output)
    if outtype is not None and form != "gguf":
        raise WeightsError(Problem("--outtype", "applies to GGUF only", "leave it out, or write --format gguf"))
    if form == "gguf":
        return _gguf(source, output, base, layout, outtype)
    if (source / _MODEL_CONFIG).is_file() and not (source / CONFIG_FILE).is_file():
        what = "is a full model, and this format is for adapters"
        do = "give the adapter's folder, or serve the model's folder as it is"
        raise WeightsError(Problem(str(source), what, do, got=f"--format {form}"))
    if form == "peft" and (base is not None or layout is not None):
        given, do = "--base" if base is not None else "--layout", "leave it out"
        raise WeightsError(Problem(given, "has no effect on a copy of the adapter", do))
    adapter = read_adapter(source, layout)
    return _peft(adapter, output) if form == "peft" else _vllm(adapter, output, base)


def _peft(adapter: Adapter, output: Path) -> Exported:
    if adapter.base_location is None:
        do = "name it in finetune.json (base.name_or_path), or ask whoever trained the adapter"
        raise WeightsError(Problem(str(adapter.folder), f"does not record its base ({RECORD_FILE})", do))
    with new_folder(output) as folder:
        names = peft.copy(adapter, folder)
        verify_sums(folder)  # the copy, against the list that training wrote
    lines = (f"{len(names)} files: {', '.join(names)}", f"PeftModel.from_pretrained(base, {str(output)!r})")
    return Exported(output, (*lines, *_effect(adapter)))


def _effect(adapter: Adapter) -> tuple[str, ...]:
    """A line about an adapter that changes nothing, or not all of its targets."""
    idle = len(adapter.without_effect())
    return (
        (f"NO EFFECT on {idle} of {len(adapter.pairs)} targets: their B is zero, as before training",) if idle else ()
    )


def _vllm(adapter: Adapter, output: Path, base: Path | None) -> Exported:
    verify_sums(adapter.folder)
    peft.require_finite(adapter.folder / WEIGHTS_FILE)
    reader = CheckpointReader(base_folder(adapter, base))
    base_fingerprint, digest = fingerprint(reader.folder), adapter.digest()
    check_related(reader.folder, base_fingerprint, forward_settings(reader.folder), (Weighted(adapter, 1.0, digest),))
    family = family_of(str(reader.config.get("model_type")), str(reader.folder / _MODEL_CONFIG))
    lora = vllm.prepare(adapter, reader, family)
    record = {
        "format": "vllm",
        "base": {"name_or_path": adapter.base_location, "fingerprint": base_fingerprint},
        "adapter": {"name_or_path": str(adapter.folder), "sha256": digest},
        "r": lora.r,
        "max_lora_rank": lora.max_lora_rank,
        **_further_ends(adapter.folder, reader.folder),
    }
    with new_folder(output) as folder:
        vllm.write(folder, adapter, lora)
        write_json(folder / EXPORT_FILE, record)
        write_text(folder / "README.md", vllm_card(adapter.record.as_dict(), record))
        write_sums(folder)
    scale = "scales are multiplied into B, " if lora.folded else ""
    lines: tuple[str, ...] = (
        f"{2 * len(lora.pairs)} tensors, {scale}r={lora.r}: {CONFIG_FILE}, {WEIGHTS_FILE}",
        f"vllm serve BASE --enable-lora --max-lora-rank {lora.max_lora_rank} --lora-modules NAME={output}",
    )
    if ends := record.get("stop_token_ids"):
        lines = (*lines, f"requests need stop_token_ids={ends}: answers end there, and the base does not stop at it")
    return Exported(output, (*lines, *_effect(adapter)))


def _further_ends(adapter: Path, base: Path) -> dict[str, Any]:
    """The ids that end the adapter's answers and at which a server of the base does not stop by itself."""
    served = stop_ids(base)
    ends = [token for token in stop_ids(adapter) if token not in served]
    return {"stop_token_ids": ends} if ends else {}


def _gguf(source: Path, output: Path, base: Path | None, layout: str | None, outtype: str | None) -> Exported:
    gguf.require_converter()
    gguf.check_output(output)
    with disk_named(output), temporary_folder(output.absolute()) as work:
        if (source / CONFIG_FILE).is_file():
            model = work / "merged"
            merge(source, model, base=base, layouts=None if layout is None else [layout])
        else:
            model = _whole_model(source, base, layout)
        outtype = outtype or gguf.own_type(CheckpointReader(model))
        print(f"converting to {outtype} with llama.cpp's converter", flush=True)
        gguf.convert(model, work / output.name, outtype, output)
        gguf.replace_with(work / output.name, output)
    return Exported(output, (f"{output.stat().st_size / 2**30:.2f} GiB, {outtype}",))


def _whole_model(source: Path, base: Path | None, layout: str | None) -> Path:
    do = "leave it out, or give an adapter's folder"
    if base is not None:
        raise WeightsError(Problem("--base", "a full model has no base", do))
    if layout is not None:
        raise WeightsError(Problem("--layout", "a full model has no LoRA factors", do, got=layout))
    if not (source / _MODEL_CONFIG).is_file():
        do = "give a merged folder, or an adapter's"
        raise WeightsError(Problem(str(source), f"holds neither {_MODEL_CONFIG} nor {CONFIG_FILE}", do))
    verify_sums(source)
    return source
