"""Rows -> examples, each with the row that it was made of."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from finetune.data.formats import Reader
from finetune.data.rows import Row, RowError
from finetune.data.types import Example


class Wrong(NamedTuple):
    """What is wrong with a row, at a place that its file has."""

    row: Row
    error: RowError


@dataclass(frozen=True)
class Item:
    """A row with its example, or with what is wrong in it."""

    row: Row
    example: Example | Wrong
    reader: Reader

    @property
    def where(self) -> str:
        """`file:line`."""
        return f"{self.row.path}:{self.row.number}"

    def wrong(self, error: RowError) -> Wrong:
        """A complaint about a place in the example, by the names of the file's own columns."""
        assert isinstance(self.row.value, dict)
        error.field = self.reader.locate(self.row.value, error.field)
        return Wrong(self.row, error)


def read_items(rows: Iterable[Row], reader: Reader) -> Iterator[Item]:
    """Every row, in order."""
    for row in rows:
        yield Item(row, _read(row, reader), reader)


def _read(row: Row, reader: Reader) -> Example | Wrong:
    if isinstance(row.value, RowError):
        return Wrong(row, row.value)
    try:
        return reader(row.value)
    except RowError as error:
        return Wrong(row, error)
