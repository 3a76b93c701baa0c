"""Whether a text says what tools, calls and results say: templates drop silently what they do not know."""

import json
from collections.abc import Iterator
from typing import Any

from finetune.data.types import Message, ToolCall

TOOL_TEMPLATES = "name a template with tool support in data.chat_template: chatml, mistral-v3, mistral-v3-tekken"


def missing_tool(tools: list[dict[str, Any]], text: str) -> str | None:
    """The name of the first tool that `text` does not name."""
    for tool in tools:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name not in text:
            return name
    return None


def missing_of_calls(calls: list[ToolCall], text: str) -> str | None:
    """The first function name or argument of `calls` that does not stand in `text`, as JSON or plainly."""
    for call in calls:
        function = call["function"]
        for value in (function["name"], *_leaves(function["arguments"])):
            if not _stands(value, text):
                return str(value)
    return None


def find_content(message: Message, text: str, start: int) -> int:
    """Where the content of a user's, tool's or earlier assistant's turn ends in `text`, from `start`; -1 if nowhere.

    White space around it may differ. A tool's result may also stand as a JSON string.
    """
    content = message["content"].strip()
    forms = [content]
    if message["role"] == "tool":
        forms += [_quoted(content, True), _quoted(content, False)]
    ends = [found + len(form) for form in forms if (found := text.find(form, start)) >= 0]
    return min(ends, default=-1)  # a later one may be another turn that says the same


def _leaves(value: object) -> Iterator[object]:
    """Everything that is said inside a JSON value: its keys, strings, numbers, true, false and null."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _stands(value: object, text: str) -> bool:
    if isinstance(value, str):
        return value.strip() in text or _quoted(value, False) in text or _quoted(value, True) in text
    return json.dumps(value) in text or str(value) in text


def _quoted(text: str, ascii_only: bool) -> str:
    """The inside of the JSON string."""
    return json.dumps(text, ensure_ascii=ascii_only)[1:-1]
