"""Rows -> examples, and the two types of them: one row of tokens (SFT), or two answers to one prompt (DPO)."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import pyarrow as pa

from finetune.data.formats import Reader, pairs
from finetune.data.render import Rendered
from finetune.data.row_errors import Row, RowError
from finetune.data.tokens.cache import PAIRS, ROWS
from finetune.data.tokens.truncation import fit, fit_pair
from finetune.data.types import Conversation, Document, Example, Ints, Judged, Message, Preference
from finetune.recipe import DataSettings


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


_MESSAGE = re.compile(r"messages\[(\d+)\](.*)", re.DOTALL)


@dataclass(frozen=True)
class Side:
    """One text that an example becomes.

    In a pair its first `prompt` messages are the example's prompt, and those behind them the field `answer` of it.
    """

    example: Conversation | Document
    answer: str | None = None
    prompt: int = 0

    def place(self, field: str | None) -> str | None:
        """A place in this text as one in the example; None where that is in the prompt and in the answer."""
        if self.answer is None or field is None:
            return field
        match = _MESSAGE.fullmatch(field)
        if match is None:
            return None if field == "messages" else field
        index = int(match[1])
        part, index = ("prompt", index) if index < self.prompt else (self.answer, index - self.prompt)
        return f"{part}[{index}]{match[2]}"


class Kept(Protocol):
    """What is written of an example: token columns, and how many tokens they stand for."""

    @property
    def columns(self) -> tuple[Ints, ...]:
        """In the order of the schema."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens that the model reads."""
        ...

    @property
    def supervised(self) -> int:
        """Tokens that carry a loss."""
        ...


class Kind(Protocol):
    """What is made of the rows of a source; `name` is part of what its rows in the cache are found by."""

    @property
    def name(self) -> str:
        """Of the kind."""
        ...

    @property
    def schema(self) -> pa.Schema:
        """The columns of what is kept, and `row` behind them."""
        ...

    def items(self, rows: Iterable[Row], reader: Reader) -> Iterator[Item]:
        """The examples in the rows, and what is wrong with rows that hold none."""
        ...

    def sides(self, example: Example) -> tuple[Side, ...]:
        """The texts to render; `RowError` for an example of another kind."""
        ...

    def fit(self, rendered: Sequence[Rendered], settings: DataSettings) -> Sequence[Kept]:
        """What is kept of them; `RowError` at a place of the example if they are no row to train on."""
        ...


class SingleRows:
    """One answer, conversation or document a row, learned by itself."""

    name, schema = "rows", ROWS

    def items(self, rows: Iterable[Row], reader: Reader) -> Iterator[Item]:
        """See `Kind`."""
        return read_items(rows, reader)

    def sides(self, example: Example) -> tuple[Side, ...]:
        """See `Kind`."""
        if isinstance(example, Conversation | Document):
            return (Side(example),)
        field, what = (
            ("chosen", "holds two answers to compare")
            if isinstance(example, Preference)
            else ("completion", "holds an answer that was judged")
        )
        do = "write method.kind: dpo, or name the file's true data format"
        raise RowError(field, f"{what}, and method.kind: sft learns one answer a row", do)

    def fit(self, rendered: Sequence[Rendered], settings: DataSettings) -> Sequence[Kept]:
        """See `Kind`."""
        [row] = rendered
        return fit(row.input_ids, row.labels, settings)


class PairedRows:
    """Two answers to one prompt, each rendered with it. Only the answers' own turns carry a loss."""

    name, schema = "pairs", PAIRS

    def items(self, rows: Iterable[Row], reader: Reader) -> Iterator[Item]:
        """See `Kind`."""
        return (read_judged_items if reader.format.gives == "judged" else read_items)(rows, reader)

    def sides(self, example: Example) -> tuple[Side, ...]:
        """See `Kind`."""
        if isinstance(example, Preference):
            return tuple(_side(example, name) for name in ("chosen", "rejected"))
        field, what = (
            ("text", "is plain text, without answers")
            if isinstance(example, Document)
            else ("messages", "holds one answer")
        )
        do = "name a format of two answers (preference, ...), or write method.kind: sft"
        raise RowError(field, f"{what}, and method.kind: dpo compares two answers to one prompt", do)

    def fit(self, rendered: Sequence[Rendered], settings: DataSettings) -> Sequence[Kept]:
        """See `Kind`."""
        chosen, rejected = rendered
        return fit_pair(chosen, rejected, settings)


SINGLE_ROWS, PAIRED_ROWS = SingleRows(), PairedRows()


def _side(example: Preference, name: str) -> Side:
    prompt = [_read_only(message) for message in example.prompt]
    return Side(Conversation([*prompt, *getattr(example, name)], example.tools), name, len(prompt))


def _read_only(message: Message) -> Message:
    return {**message, "train": False} if message["role"] == "assistant" else message
