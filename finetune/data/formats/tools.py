"""Tools that a row offers and the calls its assistant makes, in OpenAI's shape whatever the file's."""

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from finetune.data.formats.fields import below, check_utf8, checked_text
from finetune.data.row_errors import RowError, shown
from finetune.data.types import Function, ToolCall

TOOL = "write {type: function, function: {name, description, parameters}}"
CALL = "write {type: function, function: {name, arguments}}"
CALL_KEYS, FUNCTION_KEYS = frozenset({"id", "type", "function", "index"}), frozenset({"name", "arguments"})


def read_tools(value: object, place: str) -> list[dict[str, Any]] | None:
    """The tools of a row: a list, or its JSON text; bare functions (`{name, ...}`) are wrapped. None: no tool."""
    if isinstance(value, str):
        value = parse_json(value, place) if value.strip() else None
    if value is None:
        return None
    if not isinstance(value, list):
        raise RowError(
            place, "must be a list of tools", f"{TOOL} for each, in a list or as its JSON text", shown(value)
        )
    return [_tool(entry, f"{place}[{i}]") for i, entry in enumerate(value)] or None


def _tool(entry: object, place: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise RowError(place, "must be an object", TOOL, shown(entry))
    if entry.get("function") is None:
        function, inner = entry, place
    else:
        function, inner = entry["function"], f"{place}.function"
        if entry.get("type", "function") != "function":
            raise RowError(f"{place}.type", "only functions can be called", TOOL, shown(entry["type"]))
        if not isinstance(function, dict):
            raise RowError(inner, "must be an object", TOOL, shown(function))
    if function.get("name") is None:
        raise RowError(f"{inner}.name", "is missing", TOOL, shown(sorted(function)))
    checked_text(function["name"], f"{inner}.name")
    json_text(function, inner)
    for name, schema in properties(function).items():
        if schema is None:
            do = "write tools as JSON text: columns of objects give each tool the keys of all"
            raise RowError(below(f"{inner}.parameters.properties", name), "is null, which is not a schema", do)
    return {"type": "function", "function": dict(function)}


def properties(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """{argument: its schema} of a function."""
    parameters = function.get("parameters")
    declared = parameters.get("properties") if isinstance(parameters, dict) else None
    return declared if isinstance(declared, dict) else {}


def check_arguments(call: ToolCall, tools: list[dict[str, Any]], place: str) -> None:
    """An argument that is null and that the tool does not have comes from a column of objects, not from the model."""
    function = call["function"]
    declared = [properties(tool["function"]) for tool in tools if tool["function"]["name"] == function["name"]]
    for name, value in function["arguments"].items():
        if value is None and declared and name not in declared[0]:
            do = "write arguments as JSON text: columns of objects give each call the keys of all"
            raise RowError(below(place, name), "is null, and the tool has no such argument", do)


Calls = tuple[list[ToolCall], tuple[str, ...]]
"""Calls, and the place of each one's arguments."""


def read_calls(value: object, place: str) -> Calls:
    """The `tool_calls` of an assistant message, or their JSON text; an empty list is the same as none."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, place)
    if not isinstance(value, list):
        raise RowError(place, "must be a list of calls", f"{CALL} for each", shown(value))
    places = [f"{place}[{i}]" for i in range(len(value))]
    calls = [_call(entry, where) for entry, where in zip(value, places, strict=True)]
    inner = (
        f"{where}.function" if entry.get("function") else where for entry, where in zip(value, places, strict=True)
    )
    return calls, tuple(f"{where}.arguments" for where in inner)


def _call(entry: object, place: str) -> ToolCall:
    if isinstance(entry, dict) and entry.get("function") is None and entry.get("name") is not None:
        function = {key: value for key, value in entry.items() if key not in ("id", "type", "function", "index")}
        entry, inner = {**{key: entry.get(key) for key in ("id", "type")}, "function": function}, place
    else:
        inner = f"{place}.function"
    if not isinstance(entry, dict) or not isinstance(entry.get("function"), dict):
        raise RowError(place, "must be an object with function", CALL, shown(entry))
    check_known_keys(entry, place, CALL_KEYS, CALL)
    if entry.get("type") not in (None, "function"):
        raise RowError(f"{place}.type", "only functions can be called", CALL, shown(entry["type"]))
    call = ToolCall(type="function", function=read_function(entry["function"], inner))
    if not says_nothing(entry.get("id")):
        call["id"] = checked_text(entry["id"], f"{place}.id")
    return call


def read_function(entry: Mapping[str, Any], place: str) -> Function:
    """`{name, arguments}`, the arguments as an object or as its JSON text; a blank text is no arguments."""
    check_known_keys(entry, place, FUNCTION_KEYS, CALL)
    for key in ("name", "arguments"):
        if entry.get(key) is None:
            raise RowError(
                f"{place}.{key}", "is missing", "a call has a name and arguments ({} for none)", shown(entry)
            )
    name, arguments, inner = entry["name"], entry["arguments"], f"{place}.arguments"
    if isinstance(arguments, str):
        arguments = parse_json(arguments, inner) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise RowError(inner, "must be an object", "write {argument: value, ...} or its JSON text", shown(arguments))
    json_text(arguments, inner)
    return Function(name=checked_text(name, f"{place}.name"), arguments=dict(arguments))


def read_call_text(value: object, place: str) -> Calls:
    """Calls that are the content of a message: one `{name, arguments}` or a list of them, mostly as JSON text."""
    given = value if isinstance(value, dict | list) else parse_json(checked_text(value, place), place)
    entries = given if isinstance(given, list) else [given]
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise RowError(
            place, "is not a tool call", "write {name, arguments} as JSON text, or a list of them", shown(value)
        )
    calls = [_call({"function": None, **entry}, place) for entry in entries]
    return calls, (place,) * len(calls)


def parse_json(text: str, place: str) -> Any:
    """The value of a JSON text inside a row; `RowError` where it is none, or has a key twice."""
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise RowError(place, f"not valid JSON ({error})", "fix the JSON text", shown(text)) from error


def check_known_keys(entry: Mapping[str, Any], place: str, known: frozenset[str], do: str) -> None:
    """Keys of messages and calls change what is trained, so none is ignored that says something."""
    if entry.keys() <= known:
        return
    for key in sorted(entry.keys() - known):
        if not says_nothing(entry[key]):
            raise RowError(
                below(place, key), "is not supported and must not be ignored", f"remove it: {do}", shown(entry[key])
            )


def json_text(value: object, place: str) -> str:
    """The value as JSON text; values from Arrow may be dates or bytes, which no template can write."""
    try:
        text = _ENCODER.encode(value)
    except (TypeError, ValueError) as error:
        raise RowError(place, f"cannot be written as JSON ({error})", "use what JSON has", shown(value)) from error
    check_utf8(text, place)
    return text


def says_nothing(value: object) -> bool:
    """Whether a value is null, a blank text, an empty list, or an object of such values (Arrow writes these)."""
    if isinstance(value, dict):
        return all(says_nothing(inner) for inner in value.values())
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
