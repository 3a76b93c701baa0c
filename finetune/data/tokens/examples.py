"""Rows -> examples, and the two types of them: one row of tokens (SFT), or two answers to one prompt (DPO)."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import pyarrow as pa

from finetune.data.formats import Reader, pairs
from finetune.data.render import RenderedText, Renderer
from finetune.data.row_errors import Row, RowError
from finetune.data.tokens.cache import PAIRS, ROWS
from finetune.data.tokens.truncation import ANSWERS, fit, fit_pair
from finetune.data.types import (
    Conversation,
    Document,
    Judged,
    Message,
    Preference,
    Rendering,
    RowContent,
    TokenizedText,
    TokenPair,
)
from finetune.recipe import DataSettings

TextRenderer = Renderer | RenderedText
_MESSAGE = re.compile(r"messages\[(\d+)\](.*)", re.DOTALL)


class RowProblem(NamedTuple):
    """An error in a row, at a place that its file has."""

    row: Row
    error: RowError


@dataclass(slots=True)
class Example:
    """One example on its way from rows to tokens. Of two `rows` the first holds the chosen answer.

    Each step fills in its field: `content` the format, `texts` the template, `tokens` the tokenizer. Where one of them
    fails `problem` says why, and the fields after it stay empty.
    """

    rows: tuple[Row, ...]
    reader: Reader
    content: RowContent | None = None
    problem: RowProblem | None = None
    texts: tuple[Rendering, ...] = ()
    tokens: tuple[TokenizedText, ...] = ()
    left_out: int = 0  # of several texts, those that are too long

    @property
    def where(self) -> str:
        """`file:line`; of two rows `file:line+line`."""
        first, *others = self.rows
        where = place_of(first)
        for other in others:
            where += f"+{other.number}" if other.path == first.path else f"+{place_of(other)}"
        return where

    def fail(self, error: RowError) -> None:
        """Set `problem` to an error at a place of the content, named by the file's own columns."""
        row, place = self.rows[0], error.field
        if len(self.rows) == 2 and place is not None:
            row = self.rows[place.startswith("rejected")]
            for answer in ANSWERS:
                place = "completion" + place.removeprefix(answer) if place.startswith(answer) else place
        assert isinstance(row.value, dict)
        error.field = self.reader.locate(row.value, place)
        self.problem = RowProblem(row, error)

    def row_problems(self) -> list[RowProblem]:
        """For each row of an example that cannot be used the reason."""
        if self.problem is None:
            return []
        bad = self.problem.row
        what, do = f"makes a pair with {place_of(bad)}, which cannot be used", "fix that row"
        return [self.problem if row is bad else RowProblem(row, RowError(None, what, do)) for row in self.rows]


def read_examples(rows: Iterable[Row], reader: Reader) -> Iterator[Example]:
    """One example a row, in order."""
    for row in rows:
        yield _read(row, reader)


def read_judged_examples(rows: Iterable[Row], reader: Reader) -> Iterator[Example]:
    """Rows of judged answers, two by two; the rows are held until the last was read, since any may be a partner.

    In the order of each example's first row. A row that finds no partner is a problem.
    """
    examples: list[tuple[int, Example]] = []
    judged: list[tuple[int, Row]] = []
    answers: list[Judged] = []
    for number, row in enumerate(rows):
        example = _read(row, reader)
        if isinstance(example.content, Judged):
            answers.append(example.content)
            judged.append((number, row))
        else:
            examples.append((number, example))
    pairing = pairs(answers)
    for index, error in pairing.errors:
        number, row = judged[index]
        unpaired = Example((row,), reader)
        unpaired.fail(error)
        examples.append((number, unpaired))
    for preference, desirable, undesirable in pairing.pairs:
        (number, chosen), (other_number, rejected) = judged[desirable], judged[undesirable]
        examples.append((min(number, other_number), Example((chosen, rejected), reader, preference)))
    examples.sort(key=lambda numbered: -numbered[0])
    while examples:  # an example is not held once its tokens are written
        yield examples.pop()[1]


def _read(row: Row, reader: Reader) -> Example:
    if isinstance(row.value, RowError):
        return Example((row,), reader, problem=RowProblem(row, row.value))
    try:
        return Example((row,), reader, reader(row.value))
    except RowError as error:
        return Example((row,), reader, problem=RowProblem(row, error))


def place_of(row: Row) -> str:
    """`file:line`."""
    return f"{row.path}:{row.number}"


class ExampleType(Protocol):
    """The examples of a method: how they are made of rows, rendered, and written as tokens."""

    @property
    def name(self) -> str:
        """Part of the fingerprint under which prepared rows are cached."""
        ...

    @property
    def splits(self) -> bool:
        """Whether a conversation may become several examples."""
        ...

    @property
    def schema(self) -> pa.Schema:
        """The token columns that are written, then `row`."""
        ...

    def examples(self, rows: Iterable[Row], reader: Reader) -> Iterator[Example]:
        """The examples in the rows, those with a problem included."""
        ...

    def conversations(self, content: RowContent) -> tuple[Conversation | Document, ...]:
        """What is rendered; `RowError` for the content of another type."""
        ...

    def renderings(self, renderer: TextRenderer, conversation: Conversation | Document) -> tuple[Rendering, ...]:
        """The texts of one of them."""
        ...

    def locate(self, content: RowContent, index: int, field: str | None) -> str | None:
        """A place in conversation `index` as one in the content; None where no single field of it holds the place."""
        ...

    def fit(self, example: Example, settings: DataSettings) -> Sequence[TokenizedText | TokenPair]:
        """The rows to write, at most `max_length` long; `RowError` at a place of the content if there can be none."""
        ...


class SingleRows:
    """One answer, conversation or document a row, learned by itself."""

    name, splits, schema = "rows", True, ROWS

    def examples(self, rows: Iterable[Row], reader: Reader) -> Iterator[Example]:
        """See `ExampleType`."""
        return read_examples(rows, reader)

    def conversations(self, content: RowContent) -> tuple[Conversation | Document, ...]:
        """See `ExampleType`."""
        if isinstance(content, Conversation | Document):
            return (content,)
        field, what = (
            ("chosen", "holds two answers to compare")
            if isinstance(content, Preference)
            else ("completion", "holds an answer that was judged")
        )
        do = "write method.kind: dpo, or name the file's true data format"
        raise RowError(field, f"{what}, and method.kind: sft learns one answer a row", do)

    def renderings(self, renderer: TextRenderer, conversation: Conversation | Document) -> tuple[Rendering, ...]:
        """See `ExampleType`."""
        return renderer.examples(conversation)

    def locate(self, content: RowContent, index: int, field: str | None) -> str | None:
        """See `ExampleType`."""
        return field

    def fit(self, example: Example, settings: DataSettings) -> Sequence[TokenizedText | TokenPair]:
        """See `ExampleType`."""
        if settings.overlong == "error":
            fit(max(example.tokens, key=lambda text: text.tokens), settings)  # names the length that would do
        pieces: list[TokenizedText] = []
        problem = None
        for text in example.tokens:
            try:
                kept = fit(text, settings)
            except RowError as error:
                kept, problem = [], error
            example.left_out += not kept
            pieces += kept
        if problem is not None and not pieces:
            raise problem
        return pieces


class PairedRows:
    """Two answers to one prompt, each rendered with it. Only the answers' own turns carry a loss."""

    name, splits, schema = "pairs", False, PAIRS

    def examples(self, rows: Iterable[Row], reader: Reader) -> Iterator[Example]:
        """See `ExampleType`."""
        return (read_judged_examples if reader.format.gives == "judged" else read_examples)(rows, reader)

    def conversations(self, content: RowContent) -> tuple[Conversation | Document, ...]:
        """See `ExampleType`."""
        if isinstance(content, Preference):
            prompt = [_without_loss(message) for message in content.prompt]
            answers = content.chosen, content.rejected
            return tuple(Conversation([*prompt, *answer], content.tools) for answer in answers)
        field, what = (
            ("text", "is plain text, without answers")
            if isinstance(content, Document)
            else ("messages", "holds one answer")
        )
        do = "name a format of two answers (preference, ...), or write method.kind: sft"
        raise RowError(field, f"{what}, and method.kind: dpo compares two answers to one prompt", do)

    def renderings(self, renderer: TextRenderer, conversation: Conversation | Document) -> tuple[Rendering, ...]:
        """See `ExampleType`."""
        return (renderer.render(conversation),)

    def locate(self, content: RowContent, index: int, field: str | None) -> str | None:
        """See `ExampleType`."""
        if field is None:
            return None
        match = _MESSAGE.fullmatch(field)
        if match is None:
            return None if field == "messages" else field
        assert isinstance(content, Preference)
        number, prompt = int(match[1]), len(content.prompt)
        part, number = ("prompt", number) if number < prompt else (ANSWERS[index], number - prompt)
        return f"{part}[{number}]{match[2]}"

    def fit(self, example: Example, settings: DataSettings) -> Sequence[TokenizedText | TokenPair]:
        """See `ExampleType`."""
        chosen, rejected = example.tokens
        return fit_pair(chosen, rejected, settings, example.where)


SINGLE_ROWS, PAIRED_ROWS = SingleRows(), PairedRows()


def _without_loss(message: Message) -> Message:
    return {**message, "train": False} if message["role"] == "assistant" else message
