"""A content in parts: text parts, as OpenAI writes them, and the reasoning before them, as Anthropic and Mistral do."""

from typing import Any

from finetune.data.formats.fields import below
from finetune.data.formats.tools import check_known_keys, says_nothing
from finetune.data.row_errors import RowError, shown

TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("thinking", "reasoning")
OTHER_PARTS = ("image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file", "input_file")
TEXT_KEYS = frozenset({"type", "text"})
REASONING_KEYS = frozenset({"type", "thinking", "reasoning", "text", "signature"})
"""`signature` is Anthropic's seal on the text, which no model writes."""


def are_text_parts(value: list[Any]) -> bool:
    """Whether a list is a content in parts, and not a tool's result that is a list."""
    kinds = [_kind(entry) for entry in value]
    return bool(kinds) and all(kind in TEXT_PARTS + OTHER_PARTS for kind in kinds)


def text_of_parts(parts: list[Any], place: str) -> str:
    """The text parts, joined; parts of reasoning are left to `reasoning_of_parts`."""
    return "".join(_text(part, f"{place}[{i}]") for i, part in enumerate(parts) if _kind(part) not in REASONING_PARTS)


def reasoning_of_parts(parts: list[Any], place: str) -> str:
    """The parts of reasoning, joined; `RowError` for one that stands behind a text."""
    texts, text_before = [], False
    for i, part in enumerate(parts):
        where = f"{place}[{i}]"
        if _kind(part) not in REASONING_PARTS:
            text_before = text_before or (isinstance(part, dict) and not says_nothing(part.get("text")))
        elif text := _reasoning(part, where):
            if text_before:
                do = "move it before the text, or remove it"
                raise RowError(where, "is reasoning after the text of the message", do, shown(text))
            texts.append(text)
    return "".join(texts)


def _kind(part: object) -> object:
    return part.get("type") if isinstance(part, dict) else None


def _text(part: object, place: str) -> str:
    if not isinstance(part, dict):
        raise RowError(place, "must be an object with type and text", "write {type: text, text}", shown(part))
    if part.get("type") not in TEXT_PARTS:
        do = "only text can be trained on: remove the row or the part"
        raise RowError(f"{place}.type", "is not a text part", do, shown(part.get("type")))
    check_known_keys(part, place, TEXT_KEYS, "a text part has type and text")
    text = part.get("text")
    if not isinstance(text, str):
        raise RowError(f"{place}.text", "must be text", "write a string", shown(text))
    return text


def _reasoning(part: dict[str, Any], place: str) -> str:
    """The text of one part; Mistral's has a list of text parts in it, and says whether its mark is closed."""
    closed = {"closed"} if part.get("closed") is True else set()
    check_known_keys(
        part, place, REASONING_KEYS | closed, "a part of reasoning has type and thinking, or type and text"
    )
    said = [key for key in ("thinking", "reasoning", "text") if not says_nothing(part.get(key))]
    if len(said) > 1:
        raise RowError(below(place, said[1]), f"is beside {said[0]}", "keep one of the two", shown(part[said[1]]))
    if not said:
        return ""
    text, where = part[said[0]], below(place, said[0])
    if isinstance(text, list):
        return text_of_parts(text, where)
    if not isinstance(text, str):
        raise RowError(where, "must be text", "write a string", shown(text))
    return text
