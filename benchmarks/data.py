"""`python -m benchmarks.data`: packing beside TRL's, preparing rows beside the bare tokenizer, the memory of a check.

Prints the table of bars and writes a JSON file. `--quick` takes few rows: it shows that the program runs, its figures
mean nothing and are not compared with any bar.
"""

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from benchmarks.check_memory import SIZES, measure_check
from benchmarks.harness import REPEATS, provenance, table, write_result
from benchmarks.packing_waste import ROWS as PACKED_ROWS
from benchmarks.packing_waste import measure_waste
from benchmarks.preparing import ROWS, measure_preparing
from tests.real_tokenizers import mistral_tokenizer

RESULT = Path("benchmarks/results/data-cpu.json")
TOKENIZERS = ("v1", "tekken")  # SentencePiece without words, and byte-level with them
SEED = 0


def main() -> None:
    """All sections; the table and the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT, help="result file (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few rows, to show that it runs")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    started = time.monotonic()
    measured_on = provenance(SEED)
    print("=== packing", flush=True)
    bars, packing = measure_waste(1_500 if args.quick else PACKED_ROWS)
    preparing: list[dict[str, Any]] = []
    for version in TOKENIZERS[:1] if args.quick else TOKENIZERS:
        print(f"=== preparing rows, tokenizer {version}", flush=True)
        name = f"Mistral {version}"
        found, raw = measure_preparing(name, mistral_tokenizer(version), args.repeats, 40 if args.quick else ROWS)
        bars += found
        preparing.append(raw)
    print("=== memory of finetune check", flush=True)
    found, memory = measure_check((50, 100) if args.quick else SIZES)
    bars += found
    if args.quick:
        bars = [replace(bar, limit=None) for bar in bars]
    print(f"\n{table(bars)}")
    write_result(
        args.output,
        {
            "what": "waste: share of empty places of 4,096; preparing: seconds on the wall; memory: VmHWM of a process",
            "quick": args.quick,
            "repeats": args.repeats,
            "cores": len(os.sched_getaffinity(0)),
            "bars": [bar.record() for bar in bars],
            "packing": packing,
            "preparing": preparing,
            "check": memory,
            "seconds": time.monotonic() - started,
            "provenance": measured_on | {"finished": provenance(SEED)["finished"]},
        },
    )


if __name__ == "__main__":
    main()
