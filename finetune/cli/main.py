"""The `finetune` console command: one subcommand a file, each with `add_parser` and `run`."""

import argparse
import sys
from collections.abc import Sequence

import finetune
from finetune.cli import check, evaluate, families, merge, schema, train, upcycle
from finetune.errors import FinetuneError, as_expected
from finetune.quiet import hush
from finetune.threads import wait_passively

COMMANDS = (train, check, evaluate, merge, upcycle, families, schema)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line surface."""
    parser = argparse.ArgumentParser(prog="finetune", description=finetune.__doc__)
    parser.add_argument("--version", action="version", version=f"finetune {finetune.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; expected errors are printed one a line, without a traceback."""
    wait_passively()
    hush()
    args = build_parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except (FinetuneError, OSError) as error:
        print(expected := as_expected(error), file=sys.stderr)
        return expected.exit_code
    return code


if __name__ == "__main__":
    sys.exit(main())
