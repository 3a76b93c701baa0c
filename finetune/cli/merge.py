"""`finetune merge`: adapters + base -> a full checkpoint, proven."""

import argparse
from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32")
INTO = ("original", "dequantized")
FIXED_PROMPTS = 4
LAYOUTS = ("peft", "peft-0.18", "expert-major", "expert-major-0.18")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = subparsers.add_parser("merge", help="merge an adapter into its base checkpoint, and prove the result")
    parser.add_argument(
        "adapters",
        type=Path,
        nargs="+",
        metavar="ADAPTER",
        help="adapter folder, such as runs/my-run/adapter; several are added up in one pass, each trained on the base "
        "or on the model that the ones before it make",
    )
    parser.add_argument("--output", type=Path, required=True, help="new folder for the merged checkpoint")
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="one for each adapter, in their order (default: 1)"
    )
    parser.add_argument(
        "--base", type=Path, help="where the base checkpoint lies now, if not where it was trained from"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="number format of the output (default: the base's own)")
    _add_base_options(parser)
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        nargs="+",
        help="one for each adapter: the order of its experts' factors, where its files do not say; as PEFT, PEFT 0.17 "
        "and 0.18, Unsloth until September 2026, or that with those wrote it",
    )
    parser.add_argument(
        "--prompts", type=Path, help=f"text file for the proof, one prompt a line (default: {FIXED_PROMPTS} fixed ones)"
    )
    parser.add_argument("--no-proof", action="store_true", help="do not read the output again to prove it")
    parser.set_defaults(run=run)


def _add_base_options(parser: argparse.ArgumentParser) -> None:
    """The base to merge into, and what the choice costs."""
    parser.add_argument(
        "--into",
        choices=INTO,
        default=INTO[0],
        help="the base to add to: the 16-bit checkpoint (default), or the values that 4-bit training saw",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="DATA",
        help="measure on a data file what merging into either base costs, beside base + adapter as it was trained",
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
