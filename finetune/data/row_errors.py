"""A row as it comes out of a source, its errors, and the report of all of them at once."""

import json
from typing import Any, NamedTuple

from finetune.errors import DataError, Problem

MAX_PROBLEMS = 20
"""More than these are counted, not printed: the same mistake is usually in every row."""


class RowError(Exception):
    """One row is wrong: `field` names the place inside it. Becomes a `Problem` where file and number are known."""

    def __init__(self, field: str | None, what: str, do: str, got: str | None = None) -> None:
        super().__init__(what)
        self.field, self.what, self.do, self.got = field, what, do, got

    def problem(self, path: str, number: int) -> Problem:
        """The message a user reads: `file:line: field: what; got; do`."""
        where = f"{path}:{number}" if number else path
        where = where if self.field is None else f"{where}: {self.field}"
        return Problem(where=where, what=self.what, do=self.do, got=self.got)


class FileError(RowError):
    """The file itself is broken at this place, and what follows in it was not read: `on_bad_row` never drops this."""

    def __init__(self, what: str, do: str, got: str | None = None) -> None:
        super().__init__(None, what, do, got)


RowValue = dict[str, Any] | RowError
"""The object of a row, or its error."""


class Row(NamedTuple):
    """One row of a source: the object, or its error.

    `path` is how messages name the file. `number` is 1-based: the line at which the row begins in JSONL, JSON and CSV
    files, the row itself in Parquet, Arrow and hub sets; 0 with a `FileError` of the file as a whole. `progress` is
    how many units of `Source.total` were used up since the row before.
    """

    path: str
    number: int
    progress: int
    value: RowValue


class Problems:
    """Collects every problem of all files, in order; the first `limit` are kept to be printed."""

    def __init__(self, limit: int = MAX_PROBLEMS) -> None:
        self.limit = limit
        self.first: list[Problem] = []
        self.count = 0
        self._paths: dict[str, None] = {}

    def add(self, path: str, number: int, error: RowError) -> None:
        """Add the error of a row."""
        self.count += 1
        if self.count <= self.limit:
            self.first.append(error.problem(path, number))
        else:
            self._paths[path] = None

    def report(self) -> list[Problem]:
        """The problems to print: the first, and how many more there are in which files."""
        rest = self.count - len(self.first)
        if not rest:
            return self.first
        path, *others = self._paths
        where = path if not others else f"{path} and {len(others)} more file{'s' * (len(others) > 1)}"
        what = "1 more row is wrong" if rest == 1 else f"{rest} more rows are wrong"
        return [*self.first, Problem(where=where, what=what, do="fix those above first")]

    def raise_if_any(self) -> None:
        """Raise `DataError` with everything found."""
        if self.count:
            raise DataError(self.report())


def shown(value: object, limit: int = 60) -> str:
    """A value as it is quoted in messages: its JSON, cut at `limit` characters."""
    if isinstance(value, str):
        value = value[: limit + 1]
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (ValueError, TypeError, RecursionError):  # a cycle, keys that are not strings, too deep
        text = f"a {type(value).__name__}"
    # Half surrogate pairs cannot be printed.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= limit else text[:limit] + "..."
