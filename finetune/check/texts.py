"""The rows of a source without a tokenizer: what they say, and what is wrong with them."""

from collections.abc import Iterator, Sequence
from itertools import islice

from finetune.check.twins import words_of
from finetune.data.formats import reader, recognise
from finetune.data.row_errors import Problems, Row, RowError
from finetune.data.sources import open_source
from finetune.data.tokens.examples import Example, ExampleType
from finetune.errors import DataError, Problem
from finetune.recipe import DataSource


def texts(source: DataSource, row_format: str) -> Iterator[tuple[str, str]]:
    """What each sound row says, with its `file:line`."""
    read = reader(row_format, source.columns)
    for row in _rows(source):
        if not isinstance(row.value, RowError):
            try:
                yield f"{row.path}:{row.number}", words_of(read(row.value))
            except RowError:
                continue  # one of the bad rows that the recipe says to drop; it is named among them


def read_without_tokenizer(sources: Sequence[DataSource], example_type: ExampleType, max_problems: int) -> None:
    """Read every row; `DataError` with all of those that the format refuses, or that are no example of this type."""
    problems: list[Problem] = []
    for source in sources:
        try:
            problems += _refused(source, example_type, max_problems)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)


def _refused(source: DataSource, example_type: ExampleType, max_problems: int) -> list[Problem]:
    refused = Problems(max_problems)
    try:
        read = reader(_format(source), source.columns)
    except RowError as error:
        # Where no format is known, what is no row at all is still found.
        for row in _rows(source):
            if isinstance(row.value, RowError):
                refused.add(row.path, row.number, row.value)
        return [*refused.report(), error.problem(str(source.path or source.id), 0)]
    for example in example_type.examples(_rows(source), read):
        _check_content(example, example_type)
        if (problem := example.problem) is not None:
            refused.add(problem.row.path, problem.row.number, problem.error)
    return refused.report()


def _check_content(example: Example, example_type: ExampleType) -> None:
    if example.content is not None:
        try:
            example_type.conversations(example.content)
        except RowError as error:
            example.fail(error)


def _format(source: DataSource) -> str:
    if source.format != "auto":
        return source.format
    return recognise((row.value for row in _rows(source)), source.columns).format


def _rows(source: DataSource) -> Iterator[Row]:
    return islice(iter(open_source(source)), source.max_rows)
