"""One message of a file -> one turn that knows where it came from, and the order in which turns may come.

A system message is the first or there is none. Then user and assistant alternate, beginning with the user; an assistant
message that calls tools is followed by their results (at least one, at most one a call) and then by the assistant.
Two messages of one speaker in a row are an error, not joined: nearly always an answer between them is missing, and
chat templates do not agree on what to write for them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from finetune.data.formats.fields import Fields, checked_text
from finetune.data.formats.tools import check_known_keys, parse_json, read_calls
from finetune.data.formats.written_messages import written_messages
from finetune.data.row_errors import RowError, shown
from finetune.data.types import Message, Role, ToolCall


@dataclass(frozen=True)
class Spelling:
    """The names of role and content in a file."""

    role: str
    content: str

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """All keys that a message may have."""
        return self.role, self.content, "tool_calls", "tool_call_id", "name", "train", "weight"

    @cached_property
    def known(self) -> frozenset[str]:
        """The same, to look up."""
        return frozenset(self.keys)


OPENAI = Spelling("role", "content")
OPENAI_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
PART_KEYS = frozenset({"type", "text"})


class Turn(NamedTuple):
    """A message and its place in the file: a path to the object that holds it, or the column of its text."""

    message: Message
    place: str
    spelling: Spelling | None = None

    @property
    def role_place(self) -> str:
        """The place of the role in the file."""
        return f"{self.place}.{self.spelling.role}" if self.spelling else self.place

    @property
    def content_place(self) -> str:
        """The place of the content in the file."""
        return f"{self.place}.{self.spelling.content}" if self.spelling else self.place


def column_turn(row: Fields, field: str, role: Role) -> Turn:
    """The turn of a column that holds one text."""
    return Turn(Message(role=role, content=row.text(field)), row.name(field))


def read_turns(value: object, place: str, read: Callable[[object, str], Turn] | None = None) -> list[Turn]:
    """A list of messages, or its text (CSV has nothing else), each through `read` (default: OpenAI's spelling)."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        written = written_messages(value, place)
        value = parse_json(value, place) if written is None else written
    if not isinstance(value, list) or not value:
        raise RowError(place, "must be a list of messages", "write [{role, content}, ...]", shown(value))
    read = read or read_message
    return [read(entry, f"{place}[{i}]") for i, entry in enumerate(value)]


def text_or_turns(row: Fields, field: str, role: Role) -> list[Turn]:
    """A column that holds a text, spoken by `role`, or a list of messages."""
    value = row.text_or_messages(field)
    if isinstance(value, str):
        return [column_turn(row, field, role)]
    if not isinstance(value, list):
        name = row.name(field)
        raise RowError(name, "must be text or a list of messages", "write one of the two", shown(value))
    return read_turns(value, row.name(field))


def read_message(
    entry: object, place: str, spelling: Spelling = OPENAI, roles: Mapping[str, Role] = OPENAI_ROLES
) -> Turn:
    """One message as OpenAI writes it, with the role and the content under the names of `spelling`."""
    checked = checked_object(entry, place, spelling)
    role = read_role(checked, place, spelling, roles)
    calls = _calls(checked, role, place)
    content = _content(checked, spelling.content, place, may_be_empty=bool(calls))
    message = Message(role=role, content=content)
    if calls:
        message["tool_calls"] = calls
    _take_tool_names(checked, message, place)
    take_train(checked, message, place)
    return Turn(message, place, spelling)


def checked_object(entry: object, place: str, spelling: Spelling) -> Mapping[str, Any]:
    """The entry, if it is an object with the keys of a message and no others."""
    if not isinstance(entry, dict):
        do = f"write {{{spelling.role}, {spelling.content}}}"
        raise RowError(place, f"must be an object with {spelling.role} and {spelling.content}", do, shown(entry))
    if not entry.keys() <= spelling.known:
        check_known_keys(entry, place, spelling.known, f"a message has {', '.join(spelling.keys)}")
    if entry.get(spelling.role) is None:
        do = f"a message has {spelling.role} and {spelling.content}"
        raise RowError(f"{place}.{spelling.role}", "is missing", do, f"keys {sorted(entry)}")
    return entry


def read_role(entry: Mapping[str, Any], place: str, spelling: Spelling, roles: Mapping[str, Role]) -> Role:
    """The role that the file's word for it means."""
    word = entry[spelling.role]
    if not isinstance(word, str) or word not in roles:
        raise RowError(f"{place}.{spelling.role}", "unknown role", f"use one of {', '.join(roles)}", shown(word))
    return roles[word]


def take_train(entry: Mapping[str, Any], message: Message, place: str) -> None:
    """`train: bool` or `weight: 0|1` -> `train`; any turn can be left out, which matters under `loss_on: all`."""
    train, weight = entry.get("train"), entry.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"{place}.train", "must be true or false", "write true or false", shown(train))
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise RowError(f"{place}.weight", "must be 0 or 1", "a message counts or does not", shown(weight))
    if train is not None and weight is not None and train != bool(weight):
        raise RowError(f"{place}.weight", f"contradicts train: {str(train).lower()}", "keep one of them", shown(weight))
    if train is None and weight is None:
        return
    learned = bool(weight) if train is None else train
    if message["role"] == "assistant" or not learned:
        message["train"] = learned
    elif train:
        do = "remove it: data.loss_on says whether all messages are learned"
        raise RowError(f"{place}.train", "only the assistant's messages can be chosen to be learned", do, shown(train))


def _content(entry: Mapping[str, Any], key: str, place: str, may_be_empty: bool) -> str:
    place, value = f"{place}.{key}", entry.get(key)
    if may_be_empty and (value is None or value == "" or value == []):
        return ""
    if key not in entry:
        raise RowError(place, "is missing", "a message without tool_calls says something", f"keys {sorted(entry)}")
    if isinstance(value, list):
        value = "".join(_part(part, f"{place}[{i}]") for i, part in enumerate(value))
    if may_be_empty and isinstance(value, str) and not value.strip():
        return value
    return checked_text(value, place)


def _part(part: object, place: str) -> str:
    if not isinstance(part, dict):
        raise RowError(place, "must be an object with type and text", "write {type: text, text}", shown(part))
    if part.get("type") != "text":
        do = "only text can be trained on: remove the row or the part"
        raise RowError(f"{place}.type", "is not a text part", do, shown(part.get("type")))
    check_known_keys(part, place, PART_KEYS, "a text part has type and text")
    text = part.get("text")
    if not isinstance(text, str):
        raise RowError(f"{place}.text", "must be text", "write a string", shown(text))
    return text


def _calls(entry: Mapping[str, Any], role: Role, place: str) -> list[ToolCall]:
    calls = read_calls(entry.get("tool_calls"), f"{place}.tool_calls")
    if calls and role != "assistant":
        raise RowError(f"{place}.tool_calls", "only the assistant calls tools", "move the calls", shown(role))
    return calls


def _take_tool_names(entry: Mapping[str, Any], message: Message, place: str) -> None:
    if entry.get("name") is not None:
        message["name"] = _of_a_tool(entry, "name", message["role"], place)
    if entry.get("tool_call_id") is not None:
        message["tool_call_id"] = _of_a_tool(entry, "tool_call_id", message["role"], place)


def _of_a_tool(entry: Mapping[str, Any], key: str, role: Role, place: str) -> str:
    if role != "tool":
        do = "remove it, or write it into the content: chat templates leave it out"
        raise RowError(f"{place}.{key}", f"only a tool's message has a {key}", do, shown(entry[key]))
    return checked_text(entry[key], f"{place}.{key}")


def roles_of(turns: Sequence[Turn]) -> str:
    """The roles in order, as messages quote them."""
    return shown([turn.message["role"] for turn in turns])


CALL_IN_TEXT = "<tool_call>"
"""Sets in the style of Hermes write the call into the assistant's text."""


def check_order(turns: Sequence[Turn]) -> None:
    """`RowError` at the first turn that may not follow those before it, or if the last one is not the assistant's."""
    before: Message | None = None
    open_calls: list[str | None] = []  # ids (None: without one) of calls that no result has answered yet
    for turn in turns:
        message = turn.message
        what, do = _objection(before, message, open_calls)
        if what:
            raise RowError(turn.role_place, what, do, roles_of(turns))
        if message["role"] == "tool":
            _answer(turn, open_calls)
        else:
            open_calls = [call.get("id") for call in message.get("tool_calls", [])]
            if message["role"] == "assistant" and not open_calls and CALL_IN_TEXT in message["content"]:
                open_calls = [None] * message["content"].count(CALL_IN_TEXT)
        before = message
    if before is None or before["role"] != "assistant":
        do = "add the answer, or remove what follows the last one: it would be read but never learned"
        raise RowError(turns[-1].role_place, "the last message is not the assistant's", do, roles_of(turns))


def _objection(before: Message | None, message: Message, open_calls: Sequence[str | None]) -> tuple[str, str]:
    """Why `message` may not follow `before`, and what to do; two empty texts if it may."""
    role = message["role"]
    if role == "system":
        return _unless(before is None, "a system message must come first", "move it to the beginning, or merge it")
    if role == "tool":
        fits = bool(open_calls) and before is not None and before["role"] in ("assistant", "tool")
        what = "a tool result without a call before it"
        return _unless(fits, what, "add the assistant's tool_calls before it, one for each result")
    earlier: Role | None = None if before is None else before["role"]
    if role == "user":
        if earlier == "user":
            return "two user messages in a row", "join them, or add the answer that is missing between them"
        what = "a tool was called, and the user speaks before the assistant answers"
        called = earlier == "tool" or (before is not None and "tool_calls" in before)
        return _unless(not called, what, "add the tool's result and the assistant's answer")
    if earlier in (None, "system"):
        return "the assistant speaks before the user", "begin with a user message (after the system message, if any)"
    return _unless(
        earlier != "assistant",
        "two assistant messages in a row",
        "join them, or add what stood between them (a user's message, or the result of a tool call)",
    )


def _unless(fine: bool, what: str, do: str) -> tuple[str, str]:
    return ("", "") if fine else (what, do)


def _answer(turn: Turn, open_calls: list[str | None]) -> None:
    """Take the call that this result answers off the list; without an id it is the first."""
    name = turn.message.get("tool_call_id")
    if name is None or not any(open_calls):
        open_calls.pop(0)
    elif name in open_calls:
        open_calls.remove(name)
    else:
        do = "give each result the id of one call, each once"
        raise RowError(f"{turn.place}.tool_call_id", "answers no open call", do, f"{name!r}; open: {open_calls}")
