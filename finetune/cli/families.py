"""`finetune families`: list the supported architectures with their limits, and the unsupported ones with reasons."""

import argparse


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = subparsers.add_parser("families", help="list the supported architectures", description=__doc__)
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Print the table of architectures."""
    from finetune.moe.families import families_table

    print(families_table())
    return 0
