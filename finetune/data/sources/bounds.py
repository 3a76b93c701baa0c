"""Bounds that no honest file of rows meets, so that a small or broken file cannot use up the time or the memory."""

from collections.abc import Sequence

from finetune.data.row_errors import FileError, RowError, shown

MAX_ROW_BYTES = 1 << 26
"""No row is longer (64 MiB): what looks like one is a file of another kind, or one whose quotes do not match."""

MAX_COLUMNS = 10_000
MAX_VALUES = 1 << 21
"""Values in a row, keys among them: each takes about 130 bytes of memory, however short it is in the file."""

MAX_LINES = 250_000
"""Lines without a row between them: blank ones, or those of one quoted field."""

_EXPANDS_FROM = 1 << 22  # bytes unpacked, up to which no ratio is looked at
_ROW = 64  # bytes that a row takes at least


class Expansion:
    """Counts what comes out of a file of `size` bytes; `FileError` where it is more than `ratio` times as much."""

    GZIP, OTHERS = 500, 5000
    """Rows that share a prompt of 32 KiB (as far as gzip looks back) shrink to a 200th, or with others to a 2000th."""

    def __init__(self, size: int, ratio: int = OTHERS) -> None:
        self._limit = max(_EXPANDS_FROM, size * ratio)
        self._ratio = ratio
        self._unpacked = 0

    def add(self, nbytes: int, rows: int = 0) -> None:
        """Count bytes that were unpacked, and rows."""
        self._unpacked += nbytes + _ROW * rows
        if self._unpacked > self._limit:
            what = f"unpacks to more than {self._ratio:,} times its size"
            raise FileError(what, "a file of rows does not: get it from elsewhere, or unpack it if that is meant")


def check_columns(names: Sequence[str]) -> None:
    """Raise `FileError` for columns that are too many, or that have one name."""
    if len(names) > MAX_COLUMNS:
        raise FileError(f"{len(names):,} columns", f"a file of rows has at most {MAX_COLUMNS:,}: remove the others")
    if len(set(names)) < len(names):
        raise FileError(f"two columns are named {shown(first_repeated(names))}", "name each column once")


def first_repeated(names: Sequence[str]) -> str:
    """The first name that comes twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    raise ValueError("no name comes twice")


def too_many_values(text: str | bytes) -> RowError | None:
    """The error of JSON text with too many values, seen before it is decoded; most rows are too short for that."""
    if len(text) <= MAX_VALUES:
        return None
    if isinstance(text, str):
        values = text.count("[") + text.count("{") + text.count(",")
    else:
        values = text.count(b"[") + text.count(b"{") + text.count(b",")
    if values <= MAX_VALUES:
        return None
    return RowError(None, f"about {values:,} values in one row", f"a row may have {MAX_VALUES:,}: shorten or remove it")
