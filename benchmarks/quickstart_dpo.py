"""What the quickstart has trained learns from preference pairs which requests none of its commands is for.

`make quickstart-dpo` runs it, after the quickstart itself where that has not run. Counted on held-out requests before
and after: the share that is answered by {"command":"none"}, and the exact match of the commands, which must not suffer.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import quickstart
from benchmarks.quickstart import Phase, evaluate

RECIPE = Path("recipes/quickstart/dpo.yaml")
RUN = Path("runs/quickstart-dpo")
MERGED = Path("out/merged-dpo")
HELD_OUT = Path("data/quickstart/dpo-eval.jsonl")
SHOWN = 4
Result = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """All phases, then the report."""
    args = quickstart.arguments(__doc__, argv)
    # The file is written last: with it the folders hold the whole of one quickstart.
    if not ((quickstart.RUN / "quickstart.json").is_file() and quickstart.MERGED.is_dir()):
        quickstart.main([])
    exact_before: Result = json.loads((quickstart.RUN / "evaluation-after.json").read_text(encoding="utf-8"))
    started = time.monotonic()
    before_file = MERGED.parent / "quickstart-dpo-before.json"
    phase, before = evaluate("requests before", quickstart.MERGED, before_file, HELD_OUT)
    phases = [phase, quickstart.train(RECIPE, RUN)]
    shutil.move(before_file, RUN / "evaluation-before.json")
    phases.append(quickstart.merge(RUN, MERGED))
    phase, after = evaluate("requests after", MERGED, RUN / "evaluation-after.json", HELD_OUT)
    phases.append(phase)
    phase, exact_after = evaluate("commands after", MERGED, RUN / "evaluation-commands.json")
    phases.append(phase)
    report(phases, (before, after), (exact_before, exact_after))
    record = {
        "none_percent": {"before": before["exact_match"], "after": after["exact_match"]},
        "exact_match_percent": {"before": exact_before["exact_match"], "after": exact_after["exact_match"]},
        "phases": [asdict(phase) for phase in phases],
        "seconds": time.monotonic() - started,
        "peak_mib": max(phase.peak_mib for phase in phases),
    }
    quickstart.write(record, RUN, args.record)


def report(phases: list[Phase], requests: tuple[Result, Result], commands: tuple[Result, Result]) -> None:
    """Both measures before and after, the phases, and some requests answered by both models."""
    print(
        '\n=== Held-out requests that no command is for, answered by {"command":"none"} (topic: the whole topic is new)'
    )
    print_change(*requests)
    print("\n=== Held-out exact match of the commands (values: known wording, wording: wording never seen)")
    print_change(*commands)
    quickstart.print_phases(phases)
    print("\n=== Held-out requests before and after")
    before, after = (each["answers"][:: len(each["answers"]) // SHOWN] for each in requests)
    for old, new in zip(before, after, strict=True):
        print(f"{old['prompt'].strip()!r}\n  {old['answer']}\n  {new['answer']}")


def print_change(before: Result, after: Result) -> None:
    """Percent by group, and by how many points all rows moved."""
    for group, percent in after["exact_match"].items():
        print(f"{group:<10} before {before['exact_match'][group]:5.1f} %   after {percent:5.1f} %")
    print(f"moved by {after['exact_match']['all'] - before['exact_match']['all']:+.1f} points")


if __name__ == "__main__":
    main()
