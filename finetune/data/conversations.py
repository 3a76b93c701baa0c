"""A data file as conversations, before any tokenizer, for evaluation."""

from typing import Any

from finetune.data.formats import Reader, reader
from finetune.data.row_errors import Problems, Row, RowError
from finetune.data.row_size import check_characters
from finetune.data.sources import open_files
from finetune.data.types import Conversation
from finetune.errors import DataError, Problem
from finetune.recipe.row_formats import CONVERSATION_FORMATS


def conversation_reader(row_format: str) -> Reader:
    """The reader of a format that gives conversations; `DataError` for any other."""
    read = reader(row_format)
    if read.format.gives != "conversation":
        do = f"use one of {', '.join(CONVERSATION_FORMATS)}"
        what = f"{row_format} gives a {read.format.gives}, not a conversation"
        raise DataError(Problem(where="format", what=what, do=do))
    return read


def to_conversation(row: Row, read: Reader) -> Conversation:
    """The conversation of one row; `RowError` if the row or its fields are wrong."""
    if isinstance(row.value, RowError):
        raise row.value
    example = read(row.value)
    assert isinstance(example, Conversation)
    check_characters(example)
    return example


def read_conversations(path: str, row_format: str) -> list[tuple[int, dict[str, Any], Conversation]]:
    """(1-based line number, the row with all its keys, its conversation) a row; `DataError` names the bad ones."""
    read = conversation_reader(row_format)
    problems = Problems()
    rows: list[tuple[int, dict[str, Any], Conversation]] = []
    for line in open_files(path):
        try:
            conversation = to_conversation(line, read)
        except RowError as error:
            problems.add(line.path, line.number, error)
        else:
            assert isinstance(line.value, dict)
            rows.append((line.number, line.value, conversation))
    problems.raise_if_any()
    if not rows:
        raise no_rows(path)
    return rows


def no_rows(path: str) -> DataError:
    """The error of a file that has only blank lines, or none."""
    return DataError(Problem(where=path, what="the file has no rows", do="write one JSON object a line"))
