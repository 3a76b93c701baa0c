"""A data file as conversations, before any tokenizer: what evaluation reads."""

from typing import Any

from finetune.data.formats import FORMATS
from finetune.data.rows import Line, Problems, RowError, check_file, read_lines
from finetune.data.types import Conversation
from finetune.errors import DataError, Problem


def to_conversation(line: Line, row_format: str) -> Conversation:
    """The conversation of one line; `RowError` if the line or its fields are wrong."""
    if isinstance(line.value, RowError):
        raise line.value
    return FORMATS[row_format](line.value)


def read_conversations(path: str, row_format: str) -> list[tuple[int, dict[str, Any], Conversation]]:
    """(1-based line number, the row with all its keys, its conversation) a row; `DataError` names the bad ones."""
    check_file(path)
    problems = Problems(path)
    rows: list[tuple[int, dict[str, Any], Conversation]] = []
    for line in read_lines(path):
        try:
            conversation = to_conversation(line, row_format)
        except RowError as error:
            problems.add(line.number, error)
        else:
            assert isinstance(line.value, dict)
            rows.append((line.number, line.value, conversation))
    problems.raise_if_any()
    if not rows:
        raise no_rows(path)
    return rows


def no_rows(path: str) -> DataError:
    """What is raised for a file that has only blank lines, or none."""
    return DataError(Problem(where=path, what="there is no row in the file", do="write one JSON object a line"))
