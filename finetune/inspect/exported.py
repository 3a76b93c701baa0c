"""A folder that `finetune export` wrote for another program: which adapter it was made from, for which base."""

from pathlib import Path

from finetune.adapters.adapter import EXPORT_FILE
from finetune.checkpoint.reader import read_json
from finetune.inspect.lines import Line, checksum_line, named
from finetune.inspect.records import told_by

_PROGRAMS = {"vllm": "vLLM"}


def exported_lines(folder: Path, tensors: Line) -> list[Line]:
    """What `finetune inspect` says of an export; `tensors`: the line about its weights."""
    file = folder / EXPORT_FILE
    told = read_json(file)
    with told_by(file, "an export"):
        program = _PROGRAMS.get(told["format"], told["format"])
        adapter, rank = told["adapter"], told["max_lora_rank"]
        return [
            ("what", f"LoRA adapter, exported for {program}: r {told['r']}, needs --max-lora-rank {rank}"),
            tensors,
            checksum_line(folder),
            ("made from", f"{adapter['name_or_path']}, SHA-256 {adapter['sha256'][:12]}"),
            ("base", named(told["base"])),
            ("merge", "merge the adapter that it was made from"),
        ]
