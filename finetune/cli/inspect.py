"""`finetune inspect`: a summary of an adapter, checkpoint or run folder."""

import argparse
from pathlib import Path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "inspect", help="show what an adapter, checkpoint or run is, how it was made, and whether it can be merged"
    )
    parser.add_argument(
        "path", type=Path, help="the folder, or RUN@best: the checkpoint of a run with the best evaluation"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the lines."""
    from finetune.inspect import inspect

    print(inspect(args.path))
    return 0
