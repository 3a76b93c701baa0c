"""`finetune merge`: adapters + base -> a full checkpoint, verified."""

import argparse
from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32")
INTO = ("original", "dequantized")
FIXED_PROMPTS = 4
LAYOUTS = ("peft", "peft-0.18", "expert-major", "expert-major-0.18")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = subparsers.add_parser("merge", help="merge adapters into their base checkpoint and verify the result")
    parser.add_argument(
        "adapters",
        type=Path,
        nargs="+",
        metavar="ADAPTER",
        help="adapter folder or run, such as runs/my-run, runs/my-run/checkpoint-40 or runs/my-run@best; several are "
        "summed in one pass, each trained on the base or on the base with the previous ones merged in",
    )
    parser.add_argument("--output", type=Path, required=True, help="new folder for the merged checkpoint")
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="one weight per adapter, in the same order (default: 1)"
    )
    parser.add_argument("--base", type=Path, help="base checkpoint folder, if it has moved since training")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the output (default: that of the base)")
    _add_base_options(parser)
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        nargs="+",
        help="one per adapter: order of the experts' LoRA factors, if the files do not declare it; as saved by "
        "PEFT, PEFT 0.17/0.18, Unsloth before September 2026, or Unsloth with PEFT 0.17/0.18",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        help=f"text file of prompts for the proof, one per line (default: {FIXED_PROMPTS} fixed ones)",
    )
    parser.add_argument("--no-proof", action="store_true", help="skip the checks that read the output back")
    parser.set_defaults(run=run)


def _add_base_options(parser: argparse.ArgumentParser) -> None:
    """The base to merge into, and what the choice costs."""
    parser.add_argument(
        "--into",
        choices=INTO,
        default=INTO[0],
        help="base to add to: the 16-bit checkpoint (default), or the dequantised 4-bit weights used in training",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="DATA",
        help="measure loss and KL of merging into either base on a data file, against base + adapter as trained",
    )
    parser.add_argument(
        "--compare-rows", type=int, default=128, metavar="N", help="use the first N rows of DATA (default: 128)"
    )


def run(args: argparse.Namespace) -> int:
    """Merge, print the figures."""
    from finetune.merge import merge

    report = merge(
        args.adapters,
        args.output,
        weights=args.weights,
        base=args.base,
        dtype=args.dtype,
        into=args.into,
        layouts=args.layout,
        prove=not args.no_proof,
        prompts=args.prompts,
        compare=args.compare,
        compare_rows=args.compare_rows,
    )
    print(report.table())
    print(f"merged checkpoint in {args.output}")
    return 0
