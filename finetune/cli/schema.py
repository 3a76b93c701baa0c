"""`finetune schema`: the recipe's JSON Schema for editors, or its reference as Markdown."""

import argparse
import json

from finetune.recipe import json_schema, reference


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = subparsers.add_parser("schema", help="print the JSON Schema of recipes", description=__doc__)
    parser.add_argument("--reference", action="store_true", help="print the Markdown reference of all settings instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print to standard output."""
    print(reference() if args.reference else json.dumps(json_schema(), indent=2), end="" if args.reference else "\n")
    return 0
