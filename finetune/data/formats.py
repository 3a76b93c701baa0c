"""Row formats: each becomes a conversation, a list of `{role, content}`. One function a format, one table.

A conversation is an optional system message, then a user message, and it ends with the assistant. Contents are
kept as they are, white space included. Keys of a row that its format does not know are ignored; keys of a message
are not, because what they usually say (`tool_calls`, `weight`) would change what is trained.
"""

from collections.abc import Callable, Mapping
from typing import Any

from finetune.data.rows import RowError, shown
from finetune.data.types import Conversation, Message

ROLES = ("system", "user", "assistant")
Format = Callable[[Mapping[str, Any]], Conversation]


def from_messages(row: Mapping[str, Any]) -> Conversation:
    """`{"messages": [{"role": ..., "content": ...}, ...]}`."""
    entries = _required(row, "messages")
    if not isinstance(entries, list) or not entries:
        raise RowError("messages", "must be a list of messages", "write [{role, content}, ...]", shown(entries))
    conversation = [_message(entry, f"messages[{i}]") for i, entry in enumerate(entries)]
    _check_order(conversation)
    return Conversation(conversation)


def from_prompt_completion(row: Mapping[str, Any]) -> Conversation:
    """`{"prompt": str, "completion": str}`: prompt -> user, completion -> assistant."""
    return Conversation(
        [
            Message(role="user", content=_text(_required(row, "prompt"), "prompt")),
            Message(role="assistant", content=_text(_required(row, "completion"), "completion")),
        ]
    )


def from_alpaca(row: Mapping[str, Any]) -> Conversation:
    """`{"instruction": str, "input": str (may be missing, null or empty), "output": str}`.

    Instruction, and after an empty line the input, -> user; output -> assistant.
    """
    prompt = _text(_required(row, "instruction"), "instruction")
    given = row.get("input")
    if given is not None and given != "":
        prompt += "\n\n" + _text(given, "input")
    return Conversation(
        [
            Message(role="user", content=prompt),
            Message(role="assistant", content=_text(_required(row, "output"), "output")),
        ]
    )


FORMATS: dict[str, Format] = {
    "messages": from_messages,
    "prompt_completion": from_prompt_completion,
    "alpaca": from_alpaca,
}

_FIELDS = {"prompt_completion": ("prompt", "completion"), "alpaca": ("instruction", "output")}


def own_field(row_format: str, field: str | None) -> str | None:
    """The row's own name for a place in its conversation: `messages[1].content` is the `completion` of a prompt row."""
    if field is not None:
        for index, own in enumerate(_FIELDS.get(row_format, ())):
            if field.startswith(f"messages[{index}]"):
                return own
    return field


def _required(row: Mapping[str, Any], field: str) -> Any:
    if field not in row:
        raise RowError(field, "is missing", "add it, or name the file's true data format", f"keys {sorted(row)}")
    return row[field]


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise RowError(field, "must be text", "write a string", shown(value))
    if not value.strip():
        raise RowError(field, "is empty", "remove the row or fill it in", shown(value))
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(field, "half of a surrogate pair", "mend the \\u escapes", shown(ascii(value))) from error
    return value


def _message(entry: object, field: str) -> Message:
    if not isinstance(entry, dict):
        raise RowError(field, "must be an object with role and content", "write {role, content}", shown(entry))
    unknown = sorted(entry.keys() - {"role", "content"})
    if unknown:
        key, do = unknown[0], "remove it: a message has role and content only"
        raise RowError(f"{field}.{key}", "is not supported and must not be ignored", do, shown(entry[key]))
    for key in ("role", "content"):
        if key not in entry:
            raise RowError(f"{field}.{key}", "is missing", "a message has role and content", f"keys {sorted(entry)}")
    role = entry["role"]
    if role not in ROLES:
        raise RowError(f"{field}.role", "unknown role", f"use one of {', '.join(ROLES)}", shown(role))
    return Message(role=role, content=_text(entry["content"], f"{field}.content"))


def _check_order(conversation: list[Message]) -> None:
    roles = [message["role"] for message in conversation]
    if "system" in roles[1:]:
        index = roles.index("system", 1)
        raise RowError(f"messages[{index}].role", "a system message must come first", "move or merge it", shown(roles))
    if "assistant" not in roles:
        do = "add one or remove the row"
        raise RowError("messages", "no assistant message, so nothing to learn", do, shown(roles))
    if roles[roles[0] == "system"] != "user":
        do = "begin with a user message (after the system message, if any)"
        raise RowError("messages", "the assistant speaks before the user", do, shown(roles))
    if roles[-1] != "assistant":
        do = "remove what follows the last assistant message: it would be read but never learned"
        raise RowError("messages", "the last message is not the assistant's", do, shown(roles))
