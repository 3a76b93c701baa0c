"""The expected errors. Each says where, what is wrong, and what to do."""

import errno
from collections.abc import Sequence
from dataclasses import dataclass

_BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROLS = (*(code for code in range(0x20) if chr(code) != "\n"), *range(0x7F, 0xA0), 0x2028, 0x2029, *_BIDI)
_ESCAPED = {code: f"\\u{code:04x}" for code in _CONTROLS}
_ON_ONE_LINE = {**_ESCAPED, ord("\n"): "\\n"}


def printable(text: str) -> str:
    """Text of files, names and rows on one line, without characters that a terminal or a browser obeys."""
    return text.translate(_ON_ONE_LINE)


@dataclass(frozen=True)
class Problem:
    """One problem: `where` (file:line: key, file, tensor name ...), `what` is wrong, what was `got`, what to `do`."""

    where: str
    what: str
    do: str
    got: str | None = None

    def __str__(self) -> str:
        got = "" if self.got is None else f"; got {self.got}"
        # What files and rows hold must not reach the terminal as commands.
        return f"{self.where}: {self.what}{got}; {self.do}".translate(_ESCAPED)


class FinetuneError(Exception):
    """Base of all expected errors. Carries every problem found, not only the first; printed one a line."""

    exit_code = 1

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


class RecipeError(FinetuneError):
    """The recipe (or a command line override) is wrong. Found before torch is imported."""

    exit_code = 2


class DataError(FinetuneError):
    """A row, a template or a data file is wrong."""


class WeightsError(FinetuneError):
    """A checkpoint, an adapter or a loaded model is not what it should be."""


class RunError(FinetuneError):
    """Training went wrong while running (a non-finite loss, an audit that differs from the recipe)."""


def as_expected(error: FinetuneError | OSError) -> FinetuneError:
    """The error to print. An OSError about a path becomes a FinetuneError; any other OSError is raised again."""
    if isinstance(error, FinetuneError):
        return error
    if error.errno == errno.ENOSPC:
        where = "the disk being written to" if error.filename is None else str(error.filename)
        return FinetuneError(Problem(where, "the disk is full", "free space, or write to another disk"))
    if error.filename is None:
        raise error
    what = f"cannot be accessed ({error.strerror})"
    return FinetuneError(Problem(str(error.filename), what, "check that its folder exists and can be written to"))
