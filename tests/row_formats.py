"""Rows for the tests of formats: the example files, and short ways to read one row and to see it refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from finetune.data.formats import FORMATS, reader
from finetune.data.row_errors import RowError
from finetune.data.types import Conversation, Message, Preference, RowContent

EXAMPLES = Path(__file__).parents[1] / "data" / "examples"


def example_rows(row_format: str) -> list[dict[str, Any]]:
    """The rows of a format's example file."""
    lines = (EXAMPLES / f"{row_format}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


ALL_EXAMPLES = [(name, row) for name in FORMATS for row in example_rows(name)]


def convert(row_format: str, row: Mapping[str, Any], **columns: str) -> RowContent:
    return reader(row_format, columns)(row)


def talk(row_format: str, row: Mapping[str, Any], **columns: str) -> list[Message]:
    """The messages of a row that is a conversation."""
    example = convert(row_format, row, **columns)
    assert isinstance(example, Conversation)
    return example.messages


def pair(row_format: str, row: Mapping[str, Any]) -> Preference:
    """The preference of a row that is one."""
    example = convert(row_format, row)
    assert isinstance(example, Preference)
    return example


def refusal(row_format: str, row: Mapping[str, Any], **columns: str) -> str:
    """What a user reads about a row after its file and line."""
    with pytest.raises(RowError) as caught:
        convert(row_format, row, **columns)
    return str(caught.value.problem("f", 7)).removeprefix("f:7: ")


def user(content: str) -> Message:
    return Message(role="user", content=content)


def assistant(content: str) -> Message:
    return Message(role="assistant", content=content)


def system(content: str) -> Message:
    return Message(role="system", content=content)
