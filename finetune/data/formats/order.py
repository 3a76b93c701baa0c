"""In which order turns may come: one state a role, what may stand before it.

A system message stands first or nowhere. Then user and assistant take turns, beginning with the user; an assistant
message that calls tools is followed by their results (at least one, at most one a call) and then by the assistant.
Two messages of one speaker in a row are refused, not joined: nearly always an answer between them is missing, and
chat templates do not agree on what to write for them.
"""

from collections.abc import Sequence

from finetune.data.formats.turns import Turn, roles_of
from finetune.data.rows import RowError
from finetune.data.types import Message, Role

CALL_IN_TEXT = "<tool_call>"
"""Sets in the style of Hermes write the call into the assistant's text."""


def check_order(turns: Sequence[Turn]) -> None:
    """`RowError` at the first turn that may not stand where it does, or if the last one is not the assistant's."""
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
    """What speaks against `message` after `before`, and what to do; two empty texts if nothing does."""
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
