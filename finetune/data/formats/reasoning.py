"""What an assistant reasoned before its answer: beside the content of a message, in parts of it, or in a column."""

from collections.abc import Mapping
from typing import Any

from finetune.data.formats.content_parts import reasoning_of_parts
from finetune.data.formats.fields import PLACEHOLDERS, below, checked_text
from finetune.data.formats.tools import check_known_keys, parse_json, says_nothing
from finetune.data.row_errors import RowError, shown
from finetune.data.types import REASONING_KEYS, Message
from finetune.recipe.row_formats import REASONING

DETAILS = "reasoning_details"
"""OpenRouter's key for it, a list."""
DETAIL_KEYS = frozenset({"type", "text", "signature", "format", "id", "index"})
SWITCHES = frozenset({"on", "off", "yes", "no", "true", "false"})
"""Words that a column called `reasoning` has for whether the model was to reason."""


def take_reasoning(entry: Mapping[str, Any], content: str, message: Message, place: str) -> str:
    """Put the reasoning of `entry` into `message`; its place, or "" if there is none. `content`: the content's key.

    `entry` has no keys that say nothing. `RowError` for two that differ, and on a message that is not the assistant's.
    """
    values = {f"{place}.{key}": entry[key] for key in REASONING_KEYS if key in entry}
    if DETAILS in entry:
        values[f"{place}.{DETAILS}"] = _details(entry[DETAILS], f"{place}.{DETAILS}")
    parts, where = entry.get(content), f"{place}.{content}"
    if isinstance(parts, list) and message["role"] != "tool":
        values[where] = reasoning_of_parts(parts, where)
    said = {where: _text(value, where) for where, value in values.items() if not says_nothing(value)}
    if not said:
        return ""
    first, text = next(iter(said.items()))
    if message["role"] != "assistant":
        do = "remove it, or move it to the assistant's message"
        raise RowError(first, "only the assistant's messages have reasoning", do, shown(message["role"]))
    for where, other in said.items():
        check_same_reasoning(text, other, first, where)
    message["reasoning"] = text
    return first


def check_same_reasoning(text: str, other: str, place: str, others_place: str) -> None:
    """`RowError` if one message has two texts of reasoning that differ."""
    if other != text:
        what = f"is another reasoning than {place}"
        raise RowError(others_place, what, "keep one of the two", f"{shown(other)} and {shown(text)}")


def column_reasoning(value: object, place: str) -> str | None:
    """The reasoning in a column of its own; None if it is empty, or a label in one that only happens to be called so.

    `RowError` for a label in a column that the recipe names.
    """
    if says_nothing(value) or (is_label(value) and place == REASONING):
        return None
    if is_label(value):
        what, do = "is a label, not reasoning", "map the column that has the text, or remove it from columns"
        raise RowError(place, what, do, shown(value))
    return _text(value, place)


def is_label(value: object) -> bool:
    """Whether a value says whether, or how well, the model reasoned (`on`, true, 4), and not what."""
    return isinstance(value, bool | int | float) or (isinstance(value, str) and value.strip().lower() in SWITCHES)


def _text(value: object, place: str) -> str:
    if isinstance(value, str) and value.strip() in PLACEHOLDERS:
        do = "write null, or leave it empty"
        raise RowError(place, "is a word for nothing, and would be learned as a text", do, shown(value))
    return checked_text(value, place).strip()


def _details(value: object, place: str) -> str:
    """The text of a list of `{type: reasoning.text, text}`, or of its JSON text."""
    details = parse_json(value, place) if isinstance(value, str) else value
    if not isinstance(details, list):
        raise RowError(place, "must be a list", "write [{type: reasoning.text, text}]", shown(value))
    texts = []
    for i, detail in enumerate(details):
        where = f"{place}[{i}]"
        kind = detail.get("type") if isinstance(detail, dict) else detail
        if not isinstance(detail, dict) or kind != "reasoning.text":
            do = f"remove the row, or {DETAILS} to train without what it hides"
            raise RowError(where, "is not reasoning as text", do, shown(kind))
        check_known_keys(detail, where, DETAIL_KEYS, "a detail has type and text")
        if not says_nothing(detail.get("text")) and not isinstance(detail["text"], str):
            raise RowError(below(where, "text"), "must be text", "write a string", shown(detail["text"]))
        texts.append(detail.get("text") or "")
    return "".join(texts)
