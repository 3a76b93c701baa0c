"""One message of a file -> one turn that knows where it came from, and the order in which turns may come.

A system message is the first or there is none. Then user and assistant alternate, beginning with the user; an assistant
message that calls tools is followed by their results (at least one, at most one a call) and then by the assistant.
Two messages of one speaker in a row are an error, not joined: nearly always an answer between them is missing, and
chat templates do not agree on what to write for them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from finetune.data.formats.content_parts import are_text_parts, text_of_parts
from finetune.data.formats.fields import Fields, checked_text, written_number
from finetune.data.formats.reasoning import DETAILS, take_reasoning
from finetune.data.formats.tools import (
    check_known_keys,
    json_text,
    parse_json,
    read_call_text,
    read_calls,
    says_nothing,
)
from finetune.data.formats.written_messages import written_messages
from finetune.data.row_errors import RowError, shown
from finetune.data.types import REASONING_KEYS, ROLES, Message, ToolCall
from finetune.recipe.row_formats import Role

LEARNED = ("train", "loss", "weight")
"""Keys that say whether a message is in the loss."""


@dataclass(frozen=True)
class Spelling:
    """The names of role and content in a file."""

    role: str
    content: str

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """All keys that a message may have."""
        calls = "tool_calls", "function_call", "tool_call_id", "name"
        return self.role, self.content, *REASONING_KEYS, DETAILS, *calls, *LEARNED

    @cached_property
    def known(self) -> frozenset[str]:
        """The same, to look up."""
        return frozenset(self.keys)


OPENAI = Spelling("role", "content")
SHAREGPT = Spelling("from", "value")

Speaker = Role | Literal["call"]
"""Who speaks: a role, or `call` for the assistant in a message whose content is the JSON text of its tool calls."""

SPEAKERS: dict[str, Speaker] = {
    "system": "system",
    "developer": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot", "chatbot", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool_call", "function_call"), "call"),
    **dict.fromkeys(("tool", "tool_response", "function", "function_response", "observation", "ipython"), "tool"),
}
"""The words that files use for who speaks."""


class Turn(NamedTuple):
    """A message and its place in the file: a path to the object that holds it, or the column of its text.

    `call_places`: the place of each tool call's arguments. `reasoning_place`: that of the reasoning, if it has one.
    """

    message: Message
    place: str
    spelling: Spelling | None = None
    call_places: tuple[str, ...] = ()
    reasoning_place: str = ""

    @property
    def role_place(self) -> str:
        """The place of the role in the file."""
        return f"{self.place}.{self.spelling.role}" if self.spelling else self.place

    @property
    def content_place(self) -> str:
        """The place of the content in the file."""
        return f"{self.place}.{self.spelling.content}" if self.spelling else self.place

    @property
    def calls_in_content(self) -> bool:
        """Whether the calls are the content of the message."""
        return any(place.startswith(self.content_place) for place in self.call_places)


def column_turn(row: Fields, field: str, role: Role) -> Turn:
    """The turn of a column that holds one text."""
    return Turn(Message(role=role, content=row.text(field)), row.name(field))


def read_turns(row: Fields, field: str, spelling: Spelling = OPENAI) -> list[Turn]:
    """A list of messages, an object of lists (a `Sequence` of `datasets`), one message, or the text of any of them.

    `spelling` is what messages quote where a message has neither.
    """
    value, place = row.required(field), row.name(field)
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        written = written_messages(value, place)
        value = parse_json(value, place) if written is None else written
    if isinstance(value, dict):
        is_one = isinstance(value.get("role") or value.get("from"), str)
        value = [value] if is_one else _by_message(value, place)
    if not isinstance(value, list) or not value:
        do = f"write [{{{spelling.role}, {spelling.content}}}, ...]"
        raise RowError(place, "must be a list of messages", do, shown(value))
    _check_words(value, place, row.roles)
    turns: list[Turn] = []
    for i, entry in enumerate(value):
        turn = read_message(entry, f"{place}[{i}]", row.roles, spelling)
        if turns and _is_further_call(turns[-1], turn):
            turns[-1] = _with_calls(turns[-1], turn)
        else:
            turns.append(turn)
    return turns


def _by_message(columns: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """The messages of `{role: [...], content: [...]}`."""
    said = {key: entries for key, entries in columns.items() if not says_nothing(entries)}
    if not said or not all(isinstance(entries, list) for entries in said.values()):
        raise RowError(place, "must be a list of messages", "write [{role, content}, ...]", shown(columns))
    lengths = {key: len(entries) for key, entries in said.items()}
    if len(set(lengths.values())) > 1:
        do = "write one entry a message in each of them (null for none)"
        raise RowError(place, "the lists of this object are not of one length", do, shown(lengths))
    return [dict(zip(said, entries, strict=True)) for entries in zip(*said.values(), strict=True)]


def _is_further_call(before: Turn, turn: Turn) -> bool:
    """Whether the turn only calls tools, and the assistant was already speaking: parallel calls, one a message.

    An assistant's text may come before a call only if the call is a message of its own kind: formats that have such
    messages cannot write text and call in one.
    """
    earlier, message = before.message, turn.message
    if earlier["role"] != "assistant" or "tool_calls" not in message or message["content"]:
        return False
    return "tool_calls" in earlier or turn.calls_in_content


def _with_calls(before: Turn, turn: Turn) -> Turn:
    earlier, message = before.message, turn.message
    if earlier.get("train", True) != message.get("train", True):
        what = f"is not learned as {before.place} is, and both are one message of the assistant"
        raise RowError(turn.place, what, f"write the same {', '.join(LEARNED[:-1])} or {LEARNED[-1]} in both")
    if message.get("reasoning", earlier.get("reasoning")) != earlier.get("reasoning"):
        what = f"stands behind {before.place}, and both are one message of the assistant"
        raise RowError(turn.reasoning_place, what, "write its reasoning in the first", shown(message["reasoning"]))
    calls = [*earlier.get("tool_calls", []), *message["tool_calls"]]
    return before._replace(
        message=Message(**{**earlier, "tool_calls": calls}), call_places=before.call_places + turn.call_places
    )


def text_or_turns(row: Fields, field: str, role: Role) -> list[Turn]:
    """A column that holds a text, spoken by `role`, or a list of messages."""
    value = row.text_or_messages(field)
    if isinstance(value, str):
        return [column_turn(row, field, role)]
    if not isinstance(value, list | dict):
        name = row.name(field)
        raise RowError(name, "must be text or a list of messages", "write one of the two", shown(value))
    return read_turns(row, field)


def read_message(
    entry: object, place: str, roles: Mapping[str, Role] | None = None, spelling: Spelling = OPENAI
) -> Turn:
    """One message in OpenAI's spelling or ShareGPT's; `roles` are the recipe's words for who speaks."""
    if isinstance(entry, dict):
        spelling = SHAREGPT if entry.get("from") is not None else OPENAI if "role" in entry else spelling
    checked = checked_object(entry, place, spelling)
    speaker = _speaker(checked, place, spelling, roles or {})
    role: Role = "assistant" if speaker == "call" else speaker
    if speaker == "call":
        for key in ("tool_calls", "function_call"):
            if key in checked:
                what = f"the call is already in {spelling.content}"
                raise RowError(f"{place}.{key}", what, "keep one of the two", shown(checked[key]))
        content = ""
        calls, call_places = read_call_text(checked.get(spelling.content), f"{place}.{spelling.content}")
    else:
        calls, call_places = _calls(checked, role, place)
        content = _content(checked, spelling.content, place, role, may_be_empty=bool(calls) or role == "system")
    message = Message(role=role, content=content)
    if calls:
        message["tool_calls"] = calls
    reasoning_place = take_reasoning(checked, spelling.content, message, place)
    _take_tool_names(checked, message, place)
    take_train(checked, message, place)
    return Turn(message, place, spelling, call_places, reasoning_place)


def checked_object(entry: object, place: str, spelling: Spelling) -> Mapping[str, Any]:
    """The entry without keys that say nothing, if it is an object with the keys of a message and no others."""
    if not isinstance(entry, dict):
        do = f"write {{{spelling.role}, {spelling.content}}}"
        raise RowError(place, f"must be an object with {spelling.role} and {spelling.content}", do, shown(entry))
    if not entry.keys() <= spelling.known:
        check_known_keys(entry, place, spelling.known, f"a message has {', '.join(spelling.keys)}")
    if entry.get(spelling.role) is None:
        do = f"a message has {spelling.role} and {spelling.content}"
        raise RowError(f"{place}.{spelling.role}", "is missing", do, f"keys {sorted(entry)}")
    kept = (spelling.role, spelling.content)
    return {key: value for key, value in entry.items() if key in kept or not says_nothing(value)}


def _speaker(entry: Mapping[str, Any], place: str, spelling: Spelling, roles: Mapping[str, Role]) -> Speaker:
    """Who speaks, by the file's word for it; the recipe's own `roles` come first."""
    word = entry[spelling.role]
    speaker = roles.get(word) or SPEAKERS.get(word) if isinstance(word, str) else None
    if speaker is None:
        raise _unknown_role(f"{place}.{spelling.role}", word, [word])
    return speaker


def _check_words(entries: Sequence[object], place: str, roles: Mapping[str, Role]) -> None:
    """`RowError` with all words of the list for who speaks that are not known."""
    known: set[object] = set()
    unknown: dict[str, str] = {}
    for i, entry in enumerate(entries):
        key = "from" if isinstance(entry, dict) and entry.get("from") is not None else "role"
        word = entry.get(key) if isinstance(entry, dict) else None
        if isinstance(word, str) and word not in roles and word not in SPEAKERS:
            unknown.setdefault(word, f"{place}[{i}].{key}")
        elif isinstance(word, str):
            known.add(roles.get(word) or SPEAKERS[word])
    if unknown:
        word, first = next(iter(unknown.items()))
        raise _unknown_role(first, word, unknown, known)


def _unknown_role(place: str, word: object, words: Iterable[object], known: Iterable[object] = ()) -> RowError:
    """The error, which shows how the recipe names the roles: a guess, by the roles that the row lacks."""
    do = f"use one of {', '.join(ROLES)}"
    if isinstance(word, str):
        free = [role for role in ("user", "assistant", "tool") if role not in known]
        guesses = (f"{shown(each)}: {free.pop(0) if free else 'user'}" for each in words)
        do += f", or write in the recipe, beside format, which of them is meant: `roles: {{{', '.join(guesses)}}}`"
    return RowError(place, "unknown role", do, shown(word))


def take_train(entry: Mapping[str, Any], message: Message, place: str) -> None:
    """`train` or `loss: bool`, or `weight: 0|1` -> `train`; any turn can be left out, which matters under
    `loss_on: all`."""
    given = {key: _is_learned(key, entry[key], f"{place}.{key}") for key in LEARNED if entry.get(key) is not None}
    if not given:
        return
    first, learned = next(iter(given.items()))
    for key, other in given.items():
        if other != learned:
            what = f"contradicts {first}: {shown(entry[first])}"
            raise RowError(f"{place}.{key}", what, "keep one of them", shown(entry[key]))
    if message["role"] == "assistant" or not learned:
        message["train"] = learned
    elif first != "weight":
        do = "remove it: data.loss_on says whether all messages are learned"
        what = "only the assistant's messages can be chosen to be learned"
        raise RowError(f"{place}.{first}", what, do, shown(entry[first]))


def _is_learned(key: str, value: object, place: str) -> bool:
    if key == "weight":
        if isinstance(value, bool) or value not in (0, 1):
            raise RowError(place, "must be 0 or 1", "a message counts or does not", shown(value))
    elif not isinstance(value, bool):
        raise RowError(place, "must be true or false", "write true or false", shown(value))
    return bool(value)


def _content(entry: Mapping[str, Any], key: str, place: str, role: Role, may_be_empty: bool) -> str:
    place, value = f"{place}.{key}", entry.get(key)
    if may_be_empty and (value is None or value == "" or value == []):
        return ""
    if key not in entry:
        raise RowError(place, "is missing", "a message without tool_calls says something", f"keys {sorted(entry)}")
    if isinstance(value, list) and (role != "tool" or are_text_parts(value)):
        value = text_of_parts(value, place)
    if role == "tool" and isinstance(value, dict | list | bool):
        return json_text(value, place)
    if may_be_empty and isinstance(value, str) and not value.strip():
        return "" if role == "system" else value
    return checked_text(written_number(value, place), place)


def _calls(entry: Mapping[str, Any], role: Role, place: str) -> tuple[list[ToolCall], tuple[str, ...]]:
    """The tool calls, or the one `function_call` that OpenAI's messages had before."""
    key = "function_call" if "function_call" in entry else "tool_calls"
    if key not in entry:
        return [], ()
    if role != "assistant":
        raise RowError(f"{place}.{key}", "only the assistant calls tools", "move the calls", shown(role))
    if key == "tool_calls":
        return read_calls(entry[key], f"{place}.{key}")
    if "tool_calls" in entry:
        raise RowError(f"{place}.{key}", "is beside tool_calls", "keep one of the two", shown(entry[key]))
    return read_call_text(entry[key], f"{place}.{key}")


def _take_tool_names(entry: Mapping[str, Any], message: Message, place: str) -> None:
    for key in ("name", "tool_call_id"):
        if key not in entry:
            continue
        if message["role"] != "tool":
            do = "remove it, or write it into the content: chat templates leave it out"
            raise RowError(f"{place}.{key}", f"only a tool's message has a {key}", do, shown(entry[key]))
    if "name" in entry:
        message["name"] = checked_text(entry["name"], f"{place}.name")
    if "tool_call_id" in entry:
        message["tool_call_id"] = checked_text(entry["tool_call_id"], f"{place}.tool_call_id")


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
