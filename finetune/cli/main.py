"""The `finetune` console command: one subcommand a file, each with `add_parser` and `run`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import finetune
from finetune.cli import check, evaluate, export, families, inspect, merge, schema, template, train, upcycle
from finetune.environment import hush, no_telemetry, print_plainly, wait_passively
from finetune.errors import FinetuneError, as_expected
from finetune.failures import out_of_memory

INTERRUPTED, PIPE_CLOSED = 130, 141
"""What shells report for the two signals."""

COMMANDS = (train, check, template, evaluate, merge, export, inspect, upcycle, families, schema)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line surface."""
    parser = argparse.ArgumentParser(prog="finetune", description=finetune.__doc__)
    parser.add_argument("--version", action="version", version=f"finetune {finetune.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; settings of a recipe may also stand behind an option, where argparse does not look for them."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(args, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.parse_args(argv)  # says what is wrong, and ends
    elif rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _expanded(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with `~` in paths replaced by the home folder, which shells leave as it is in `--output=~/a`."""

    def expanded(value: object) -> object:
        if isinstance(value, list):
            return [expanded(each) for each in value]
        return Path(os.path.expanduser(value)) if isinstance(value, Path) else value

    return argparse.Namespace(**{name: expanded(value) for name, value in vars(args).items()})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; expected errors are printed one a line, without a traceback."""
    wait_passively()
    no_telemetry()
    hush()
    print_plainly()
    args = _expanded(_parsed(argv))
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        line, code = "interrupted", INTERRUPTED
    except BrokenPipeError:
        # Whoever read has seen enough (`| head`). Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        expected: FinetuneError | None = out_of_memory(error, args.command)
        if expected is None and isinstance(error, FinetuneError | OSError):
            expected = as_expected(error)
        if expected is None:
            raise
        line, code = str(expected), expected.exit_code
    # After the handlers, where the frames of the error are gone and their progress bars have ended their lines.
    print(line, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
