"""The arguments of tool calls: whether a template takes them as an object or as JSON text, and how it writes them.

Most templates write an object with `tojson` or parameter by parameter. Some join the arguments with other text, as
OpenAI's API has them (DeepSeek-V3): an object makes them fail, or print Python (`{'deep': True}`).
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from finetune.data.row_errors import RowError
from finetune.data.types import Function, Message, ToolCall

Form = Literal["object", "text"]
Render = Callable[[list[Any], list[dict[str, Any]]], str]

_NAME = "probe"
_PROBE: dict[str, Any] = {"city": 'Z\u00fcrich "old"', "deep": True, "days": [1, None], "near": {"sea": False}}
_TYPES = {"city": "string", "deep": "boolean", "days": "array", "near": "object"}
_PARAMETERS = {
    "type": "object",
    "properties": {name: {"type": kind, "description": name} for name, kind in _TYPES.items()},
    "required": list(_TYPES),
}
_TOOL = {"type": "function", "function": {"name": _NAME, "description": "Looks it up", "parameters": _PARAMETERS}}
_SPACE = re.compile(r"\s+")
_PYTHON = {True: "True", False: "False", None: "None"}


def arguments_form(render: Render) -> Form:
    """How a template takes arguments: as text where it fails on an object or prints it as Python, and not on text."""
    try:
        written = render(_probe(_PROBE), [_TOOL])
    except RowError:
        written = None
    if written is not None and str(_PROBE) not in written:
        return "object"
    text = as_text(_PROBE)
    try:
        return "text" if text in render(_probe(text), [_TOOL]) else "object"
    except RowError:
        return "object"


def as_text(arguments: Mapping[str, Any]) -> str:
    """The arguments as JSON text."""
    return json.dumps(arguments, ensure_ascii=False)


def with_arguments_as_text(message: Message) -> Message:
    """The message with the arguments of each call as JSON text, which `Message` itself never has."""
    calls: list[Any] = [
        {**call, "function": {**call["function"], "arguments": as_text(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else message


def python_in(call: ToolCall, text: str) -> str | None:
    """What of the arguments stands in `text` as Python and not as JSON, if anything.

    A template whose calls are Python (`probe(deep=True)`) or that writes a parameter alone (`<p=deep>True`) is left to
    its own ways: only objects and lists, and values beside a key in quotes, must be JSON.
    """
    function = call["function"]
    if f"{function['name']}(" in text:
        return None
    dense = _SPACE.sub("", text)
    for value in _containers(function["arguments"]):
        python = repr(value)
        forms = {_SPACE.sub("", json.dumps(value, ensure_ascii=ascii_only)) for ascii_only in (True, False)}
        if _SPACE.sub("", python) in dense and not any(form in dense for form in forms):
            return python
    for key, value in _constants(function["arguments"]):
        if match := re.search(rf"[\"']{re.escape(key)}[\"']\s*:\s*{_PYTHON[value]}\b", text):
            return match[0]
    return None


def _containers(value: object) -> Iterator[object]:
    """Every object and list inside a JSON value, itself included, that Python writes in its own way."""
    if isinstance(value, dict | list):
        if value:
            yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _containers(inner)


def _constants(value: object) -> Iterator[tuple[str, bool | None]]:
    """(key, value) of every true, false and null that an object inside a JSON value holds."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if inner is None or isinstance(inner, bool):
                yield key, inner
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _constants(inner)


def _probe(arguments: Any) -> list[Any]:
    call = ToolCall(type="function", id="abcdefghi", function=Function(name=_NAME, arguments=arguments))
    return [
        Message(role="user", content="What is it?"),
        Message(role="assistant", content="", tool_calls=[call]),
        Message(role="tool", content="4", tool_call_id="abcdefghi", name=_NAME),
        Message(role="assistant", content="It is four!"),
    ]
