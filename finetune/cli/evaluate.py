"""`finetune evaluate MODEL --data FILE`: held-out exact match and router load."""

import argparse
from pathlib import Path

from finetune.cli.arguments import variable
from finetune.recipe.row_formats import CONVERSATION_FORMATS


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = subparsers.add_parser("evaluate", help="held-out exact match by greedy generation, and router load")
    parser.add_argument(
        "model", type=Path, help="folder of a full checkpoint, an adapter or a run, RUN/checkpoint-N or RUN@best"
    )
    parser.add_argument("--data", type=Path, required=True, help="JSONL file of held-out rows")
    parser.add_argument("--format", default="messages", choices=CONVERSATION_FORMATS)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the computation (default: float32; for an adapter that of its training)",
    )
    parser.add_argument(
        "--system",
        default="error",
        choices=("error", "merge_into_first_user"),
        help="data.system of the recipe: how to treat a system message that the chat template rejects",
    )
    parser.add_argument(
        "--template-args",
        nargs="+",
        default=[],
        type=variable,
        metavar="NAME=VALUE",
        help="data.template_args of the recipe, for a model that does not record them: enable_thinking=false",
    )
    parser.add_argument("--batch-size", type=_at_least_one, default=16, help="rows generated at a time")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print, and write the JSON if asked."""
    from finetune.evaluate import evaluate, load_table

    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    result = evaluate(
        args.model, args.data, args.format, args.dtype, args.batch_size, args.system, dict(args.template_args)
    )
    for group, percent in result.exact_match.items():
        print(f"exact match, {group}: {percent:.1f} %")
    if result.load is not None:
        print(load_table(result.load))
    if args.output is not None:
        result.write(args.output)
        print(f"written: {args.output}")
    return 0


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1; got {text}")
    return int(text)
