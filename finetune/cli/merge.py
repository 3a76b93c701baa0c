"""`finetune merge`: adapter + base -> a full checkpoint, proven."""

import argparse
from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32")
LAYOUTS = ("peft", "peft-0.18", "expert-major", "expert-major-0.18")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = subparsers.add_parser("merge", help="merge an adapter into its base checkpoint, and prove the result")
    parser.add_argument("adapter", type=Path, help="adapter folder, such as runs/my-run/adapter")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the merged checkpoint")
    parser.add_argument(
        "--base", type=Path, help="where the base checkpoint lies now, if not where it was trained from"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="number format of the output (default: the base's own)")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="order of the experts' factors, for an adapter of another tool that does not say: as PEFT, PEFT 0.17 and "
        "0.18, Unsloth, or Unsloth with those wrote it",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Merge, print the figures."""
    from finetune.merge import merge

    report = merge(args.adapter, args.output, base=args.base, dtype=args.dtype, layout=args.layout)
    print(report.table())
    print(f"merged checkpoint in {args.output}")
    return 0
