"""Formats that hold a list of messages: OpenAI's and ShareGPT's."""

from typing import Any

from finetune.data.formats.drafts import Talk
from finetune.data.formats.fields import Fields, checked_text
from finetune.data.formats.tools import read_call_text, read_tools
from finetune.data.formats.turns import (
    OPENAI,
    OPENAI_ROLES,
    Spelling,
    Turn,
    checked_object,
    column_turn,
    read_message,
    read_turns,
    take_train,
)
from finetune.data.rows import RowError
from finetune.data.types import Message, Role

SHAREGPT = Spelling("from", "value")
CALLS = ("function_call", "tool_call")
SHAREGPT_ROLES: dict[str, Role] = {
    **OPENAI_ROLES,
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    **dict.fromkeys(CALLS, "assistant"),
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}


def messages(row: Fields) -> Talk:
    """`messages`: OpenAI's chat, with `tools` (a list, or its JSON text) beside it."""
    return Talk(read_turns(row.required("messages"), row.name("messages")), tools_of(row))


def sharegpt(row: Fields) -> Talk:
    """`conversations` or `conversation`: turns of from and value, or of role and content; `system`, `tools`."""
    return Talk(sharegpt_turns(row), tools_of(row))


def sharegpt_turns(row: Fields) -> list[Turn]:
    """The row's `system`, if it has one, and its turns."""
    turns = read_turns(row.required("conversations"), row.name("conversations"), sharegpt_turn)
    if row.optional_text("system") is None:
        return turns
    if turns[0].message["role"] == "system":
        do = "keep one of the two"
        raise RowError(row.name("system"), f"the row has a second system message in {turns[0].place}", do)
    return [column_turn(row, "system", "system"), *turns]


def sharegpt_turn(entry: object, place: str) -> Turn:
    """One turn in either spelling; the text of a function call is JSON: one `{name, arguments}` or a list of them."""
    spelling = OPENAI if isinstance(entry, dict) and entry.get("from") is None and "role" in entry else SHAREGPT
    if not isinstance(entry, dict) or entry.get(spelling.role) not in CALLS:
        return read_message(entry, place, spelling, SHAREGPT_ROLES)
    checked = checked_object(entry, place, spelling)
    text = checked_text(checked.get(spelling.content), f"{place}.{spelling.content}")
    calls = read_call_text(text, f"{place}.{spelling.content}")
    message = Message(role="assistant", content="", tool_calls=calls)
    take_train(checked, message, place)
    return Turn(message, place, spelling)


def tools_of(row: Fields) -> list[dict[str, Any]] | None:
    """The tools that stand beside the messages."""
    return read_tools(row.optional("tools"), row.name("tools"))
