"""`finetune families`: which architectures are supported, how far, and which are refused for what reason."""

import argparse


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = subparsers.add_parser("families", help="list the supported architectures", description=__doc__)
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Print the table that the program and its tests work with."""
    from finetune.moe.listing import families_table

    print(families_table())
    return 0
