"""Rows -> examples, each with the rows that it was made of: one, or two judged answers that make a pair."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from finetune.data.formats import Reader, pairs
from finetune.data.rows import Row, RowError
from finetune.data.types import Example, Judged


class Wrong(NamedTuple):
    """What is wrong with a row, at a place that its file has."""

    row: Row
    error: RowError


@dataclass(frozen=True)
class Item:
    """What `rows` hold, or what is wrong in one of them. Of two rows the first holds the chosen answer."""

    rows: tuple[Row, ...]
    example: Example | Wrong
    reader: Reader

    @property
    def where(self) -> str:
        """`file:line`; of two rows `file:line+line`."""
        first, *others = self.rows
        where = place_of(first)
        for other in others:
            where += f"+{other.number}" if other.path == first.path else f"+{place_of(other)}"
        return where

    def wrong(self, error: RowError) -> Wrong:
        """A complaint about a place in the example, by the names of the file's own columns."""
        row, place = self.rows[0], error.field
        if len(self.rows) == 2 and place is not None:
            row = self.rows[place.startswith("rejected")]
            for answer in ("chosen", "rejected"):
                place = "completion" + place.removeprefix(answer) if place.startswith(answer) else place
        assert isinstance(row.value, dict)
        error.field = self.reader.locate(row.value, place)
        return Wrong(row, error)

    def left_out(self, wrong: Wrong) -> list[Wrong]:
        """Every row of an item that cannot be used, with the reason."""
        what, do = f"makes a pair with {place_of(wrong.row)}, which cannot be used", "mend that row"
        return [wrong if row is wrong.row else Wrong(row, RowError(None, what, do)) for row in self.rows]


def read_items(rows: Iterable[Row], reader: Reader) -> Iterator[Item]:
    """Every row by itself, in order."""
    for row in rows:
        yield Item((row,), _read(row, reader), reader)


def read_judged_items(rows: Iterable[Row], reader: Reader) -> Iterator[Item]:
    """Rows of judged answers, two by two; the rows are held until the last was read, since any may be a partner.

    In the order of each item's first row. A row that finds no partner is wrong.
    """
    alone: list[tuple[int, Item]] = []
    judged: list[Judged] = []
    numbered: list[tuple[int, Row]] = []
    for number, row in enumerate(rows):
        example = _read(row, reader)
        if isinstance(example, Judged):
            judged.append(example)
            numbered.append((number, row))
        else:
            alone.append((number, Item((row,), example, reader)))
    found = pairs(judged)
    for index, error in found.errors:
        number, row = numbered[index]
        alone.append((number, _unpaired(row, error, reader)))
    for preference, good, bad in found.pairs:
        rows_of_it = (numbered[good][1], numbered[bad][1])
        alone.append((min(numbered[good][0], numbered[bad][0]), Item(rows_of_it, preference, reader)))
    for _, item in sorted(alone, key=lambda each: each[0]):
        yield item


def _unpaired(row: Row, error: RowError, reader: Reader) -> Item:
    assert isinstance(row.value, dict)
    error.field = reader.locate(row.value, error.field)
    return Item((row,), Wrong(row, error), reader)


def _read(row: Row, reader: Reader) -> Example | Wrong:
    if isinstance(row.value, RowError):
        return Wrong(row, row.value)
    try:
        return reader(row.value)
    except RowError as error:
        return Wrong(row, error)


def place_of(row: Row) -> str:
    """`file:line`."""
    return f"{row.path}:{row.number}"
