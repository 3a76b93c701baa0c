"""`make bench-gpu`: Mixtral-8x7B's true shapes on one GPU, in bf16, from random NF4 weights, in under 8 minutes.

Experts and whole decoder layers beside what people use, then the whole model: tokens/s, peak memory, useful FLOPs. What
could not be measured is named with its reason. `--dry-run` takes tiny shapes on the CPU: it shows that the program
runs, its figures mean nothing.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

# Also what the toolkit's lower layers import; neither trl nor datasets.
NEEDED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "pydantic", "yaml", "safetensors", "psutil")
RESULT = Path("benchmarks/results/mixtral-gpu.json")


def missing_packages() -> list[str]:
    """What this Python lacks."""
    return [name for name in NEEDED if find_spec(name) is None]


def check_machine(dry_run: bool) -> None:
    """Say in one line what is missing, before anything else is imported."""
    if missing := missing_packages():
        sys.exit(
            f"bench-gpu: {sys.executable} lacks {', '.join(missing)}; install them there, "
            "or name another Python: make bench-gpu BENCH_PYTHON=..."
        )
    import torch

    if not dry_run and not torch.cuda.is_available():
        sys.exit("bench-gpu: no CUDA device; --dry-run shows on the CPU that the program runs")


def main() -> None:
    """All sections, then the table and the result file; exit code 1 if a section failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT, help="result file (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=440, help="time for all measurements (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    args = parser.parse_args()
    check_machine(args.dry_run)
    from benchmarks.gpu_sections import run_all
    from benchmarks.plan import DRY, H200

    failed = run_all(DRY if args.dry_run else H200, args.seconds, args.output, args.dry_run)
    if failed:
        sys.exit(f"bench-gpu: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
