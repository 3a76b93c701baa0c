"""Read a JSONL file: one JSON object a line, every bad line found in one pass."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import DataError, Problem

MAX_PROBLEMS = 20
"""More than these are counted, not printed: the same mistake usually stands in every row."""

WRITE_JSONL = "write one JSON object a line (JSONL), UTF-8"
_BOM = b"\xef\xbb\xbf"


class RowError(Exception):
    """One row is wrong: `field` names the place inside it. Becomes a `Problem` where file and line are known."""

    def __init__(self, field: str | None, what: str, do: str, got: str | None = None) -> None:
        super().__init__(what)
        self.field, self.what, self.do, self.got = field, what, do, got

    def problem(self, path: str, line: int) -> Problem:
        """The message a user reads: `file:line: field: what; got; do`."""
        where = f"{path}:{line}" if self.field is None else f"{path}:{line}: {self.field}"
        return Problem(where=where, what=self.what, do=self.do, got=self.got)


class Problems:
    """Collects every problem of a file; `raise_if_any` reports the first `MAX_PROBLEMS` and counts the rest."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._first: list[Problem] = []
        self._count = 0

    def add(self, line: int, error: RowError) -> None:
        """Remember what is wrong in this line (1-based)."""
        self._count += 1
        if self._count <= MAX_PROBLEMS:
            self._first.append(error.problem(self.path, line))

    def raise_if_any(self) -> None:
        """Raise `DataError` with everything found."""
        rest = self._count - len(self._first)
        if rest:
            do = "mend those above first"
            self._first.append(Problem(where=self.path, what=f"{rest} more rows are wrong", do=do))
        if self._first:
            raise DataError(self._first)


@dataclass(frozen=True)
class Line:
    """One line that is not blank: its 1-based number, its length in bytes, and the object, or what is wrong with it."""

    number: int
    nbytes: int
    value: dict[str, Any] | RowError


def check_file(path: str) -> int:
    """The size in bytes of a data file that can be read; `DataError` otherwise."""
    do = "give the path of a JSONL file, relative to the folder the command is run in"
    if not Path(path).exists():
        raise DataError(Problem(where=path, what="no such data file", got=f"working directory {os.getcwd()}", do=do))
    if not Path(path).is_file():
        raise DataError(Problem(where=path, what="is not a file", do=do))
    return Path(path).stat().st_size


def read_lines(path: str) -> Iterator[Line]:
    """Stream the lines of a JSONL file. A byte order mark and blank lines are skipped; numbers stay the file's own."""
    # Bytes, cut at \n only: U+2028 and the like may stand inside a JSON string and end no line.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(_BOM) if number == 1 else line
            if content.strip():
                yield Line(number, len(line), _parse(content))


def _parse(content: bytes) -> dict[str, Any] | RowError:
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as error:
        return RowError(None, "not UTF-8", "save the file as UTF-8", f"byte 0x{content[error.start]:02x}")
    except RowError as error:
        return error
    except (ValueError, RecursionError) as error:
        return RowError(None, f"not valid JSON ({error})", WRITE_JSONL, shown(content.decode("utf-8").strip()))
    if not isinstance(value, dict):
        return RowError(None, "a row must be a JSON object", WRITE_JSONL, shown(value))
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RowError(twice, "the key stands twice in one object", "keep one of them")
    return row


def shown(value: object, limit: int = 60) -> str:
    """A value as it is quoted in messages: its JSON, cut at `limit` characters."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= limit else text[:limit] + "..."
