"""How large a row is: looked at before it is rendered and tokenised, which takes up to 800 bytes for a character."""

from typing import Any

from finetune.data.row_errors import RowError
from finetune.data.types import RowContent, contents_of
from finetune.recipe import DataSettings

DEFAULT_CHARACTERS: int = DataSettings.model_fields["max_row_characters"].default
_VALUE = 8
"""Characters that a value counts as that is no text."""


def weight(value: Any) -> int:
    """Characters of all texts in a value of JSON, keys among them, and some for each other value."""
    total = 0
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, dict):
            waiting += value
            waiting += value.values()
        elif isinstance(value, list | tuple):
            total += _VALUE * len(value)
            waiting += [entry for entry in value if isinstance(entry, str | dict | list | tuple)]
        else:
            total += _VALUE
    return total


def characters_of(content: RowContent) -> int:
    """Characters of all texts of a row: contents, reasoning, calls and tools."""
    total = sum(map(len, contents_of(content)))
    for turns in ("messages", "prompt", "chosen", "rejected", "completion"):
        for message in getattr(content, turns, ()):
            if "tool_calls" in message:
                total += weight(message["tool_calls"])
    tools = getattr(content, "tools", None)
    return total + (weight(tools) if tools else 0)


def check_characters(content: RowContent, limit: int | None = None) -> None:
    """Raise `RowError` for a row of more characters than `data.max_row_characters`; None: its default, unnamed."""
    characters = characters_of(content)
    if characters <= (DEFAULT_CHARACTERS if limit is None else limit):
        return
    if limit is None:
        what, do = f"above {DEFAULT_CHARACTERS:,}", "shorten the row"
    else:
        what = f"above data.max_row_characters = {limit:,}"
        do = "shorten the row, or raise data.max_row_characters if there is memory for it"
    raise RowError(None, f"{characters:,} characters in one row: {what}", do)
