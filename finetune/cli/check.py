"""`finetune check RECIPE [key.path=value ...]`: check the recipe and every row without loading weights."""

import argparse
import os
import sys
from pathlib import Path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = subparsers.add_parser("check", help="check a recipe and every row, and print statistics and samples")
    parser.add_argument("recipe", type=Path, help="path of a YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the recipe's")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="also write the report as one self-contained HTML page"
    )
    parser.add_argument("--samples", type=_whole, default=2, metavar="N", help="rows shown per data set (default: 2)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check, print, write the page if asked; problems that would stop a run are raised last."""
    from finetune.errors import DataError, RecipeError, printable
    from finetune.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)  # before torch is imported
    from finetune.check import Style, lines, write_page
    from finetune.check.gather import gather

    if args.html is not None:
        args.html.parent.mkdir(parents=True, exist_ok=True)  # before the work, to fail early
    report = gather(recipe, str(args.recipe), args.samples)
    for line in lines(report, Style.of(sys.stdout, os.environ)):
        print(line)
    if args.html is not None:
        write_page(report, args.html)
        print(f"written: {printable(str(args.html))}")
    if report.problems:
        sys.stdout.flush()
        raise (RecipeError if report.exit_code == RecipeError.exit_code else DataError)(report.problems)
    return 0


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number; got {text}")
    return int(text)
