"""One row of a data file by its line, `FILE:LINE`, in any row format, as the conversations that it is trained as."""

from dataclasses import dataclass
from itertools import islice

from finetune.data.formats import SAMPLE_ROWS, reader, recognise
from finetune.data.row_errors import FileError, Row, RowError
from finetune.data.row_size import check_characters
from finetune.data.sources import Source, open_files
from finetune.data.tokens.examples import PAIRED_ROWS, SINGLE_ROWS, Example, ExampleType
from finetune.data.types import Conversation, Document, Judged, Preference, RowContent
from finetune.errors import DataError, Problem


@dataclass(frozen=True)
class SingleRow:
    """A row that its format reads. Of a pair each answer is a text of its own, and only the answer is supervised."""

    example: Example

    @property
    def texts(self) -> list[tuple[str, Conversation | Document]]:
        """Each with its title: `file:line`, and which answer of a pair it is."""
        given, where = self._content(), self.example.where
        if isinstance(given, Judged):
            # Beside an answer of another row it makes a pair.
            pair = Preference(given.prompt, given.completion, given.completion)
            title = f"{where} {'desirable' if given.desirable else 'undesirable'}"
            return [(title, PAIRED_ROWS.conversations(pair)[0])]
        if isinstance(given, Preference):
            titles = (f"{where} chosen", f"{where} rejected")
            return list(zip(titles, PAIRED_ROWS.conversations(given), strict=True))
        return [(where, text) for text in SINGLE_ROWS.conversations(given)]

    @property
    def example_type(self) -> ExampleType:
        """How its texts are rendered: an answer of a pair as one text, a conversation as several where need be."""
        return PAIRED_ROWS if isinstance(self._content(), Preference | Judged) else SINGLE_ROWS

    def refusal(self, index: int, error: RowError) -> DataError:
        """The error of text `index`, at its place in the file."""
        given, field = self._content(), error.field
        if isinstance(given, Preference):
            error.field = PAIRED_ROWS.locate(given, index, field)
        elif isinstance(given, Judged):
            pair = Preference(given.prompt, given.completion, given.completion)
            error.field = (PAIRED_ROWS.locate(pair, 0, field) or "").replace("chosen", "completion", 1) or None
        self.example.fail(error)
        assert self.example.problem is not None
        row, located = self.example.problem
        return DataError(located.problem(row.path, row.number))

    def _content(self) -> RowContent:
        assert self.example.content is not None
        return self.example.content


def read_single_row(place: str, row_format: str = "auto") -> SingleRow:
    """The row that begins at `FILE:LINE`; `DataError` where there is none, or its format cannot read it."""
    path, _, line = place.rpartition(":")
    if not path or not line.isdecimal() or not int(line):
        raise _wrong(place, "not a row of a file", "write FILE:LINE, such as data/examples/messages.jsonl:1")
    source = open_files(path)
    if len(source.paths) > 1:
        raise _wrong(place, f"this names {len(source.paths)} files", "name one of them")
    row = _row(source, place, int(line))
    if isinstance(row.value, RowError):
        raise DataError(row.value.problem(row.path, row.number))
    read = reader(_format(source, path) if row_format == "auto" else row_format)
    try:
        content = read(row.value)
        check_characters(content)
        return SingleRow(Example((row,), read, content))
    except RowError as error:
        raise DataError(error.problem(row.path, row.number)) from error


def _row(source: Source, place: str, line: int) -> Row:
    """The row that begins at this line; what follows it is not read."""
    last = 0
    for row in source:
        if isinstance(row.value, FileError) and row.number <= line:
            raise DataError(row.value.problem(row.path, row.number))
        if row.number == line:
            return row
        if row.number > line:
            around = f"{last} and {row.number}" if last else f"{row.number}"
            raise _wrong(place, "no row begins at this line", f"name line {row.number}", f"rows at {around}")
        last = row.number
    raise _wrong(place, "the file has no such line", f"name a line up to {last}", f"the last row is at {last}")


def _format(source: Source, path: str) -> str:
    try:
        return recognise(row.value for row in islice(iter(source), SAMPLE_ROWS)).format
    except RowError as error:
        do = "name it with --format, or map the columns in a recipe and use `finetune check`"
        raise _wrong(path, error.what, do, error.got) from error


def _wrong(place: str, what: str, do: str, got: str | None = None) -> DataError:
    return DataError(Problem(place, what, do, got))
