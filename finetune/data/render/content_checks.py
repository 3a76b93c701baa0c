"""Whether a template writes all of a conversation's content: templates silently drop what they do not know.

Tools and tool calls above all; then reasoning, system messages and the results of tools.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from finetune.data.render.call_arguments import python_in
from finetune.data.render.chat_template import ChatTemplate
from finetune.data.render.sandbox import ANOTHER_TEMPLATE
from finetune.data.row_errors import RowError, shown
from finetune.data.types import Answer, Conversation, Message, ToolCall

TOOL_TEMPLATES = "name a template with tool support in data.chat_template: chatml, mistral-v3 or later"


def missing_tool(tools: list[dict[str, Any]], text: str) -> str | None:
    """The name of the first tool that `text` does not name."""
    for tool in tools:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name not in text:
            return name
    return None


def missing_of_calls(calls: list[ToolCall], text: str) -> str | None:
    """The first function name or argument of `calls` that does not occur in `text`, as JSON or plainly."""
    for call in calls:
        function = call["function"]
        for value in (function["name"], *_leaves(function["arguments"])):
            if not _occurs(value, text):
                return str(value)
    return None


def find_content(message: Message, text: str, start: int) -> int:
    """Where the content of a user's, tool's or earlier assistant's turn ends in `text`, from `start`; -1 if nowhere.

    White space around it may differ. A tool's result may also be written as a JSON string.
    """
    content = message["content"].strip()
    forms = [content]
    if message["role"] == "tool":
        forms += [_quoted(content, True), _quoted(content, False)]
    ends = [position + len(form) for form in forms if (position := text.find(form, start)) >= 0]
    return min(ends, default=-1)  # a later one may be another turn with the same content


def _leaves(value: object) -> Iterator[object]:
    """Every scalar and key inside a JSON value: its keys, strings, numbers, true, false and null."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _occurs(value: object, text: str) -> bool:
    if isinstance(value, str):
        return value.strip() in text or _quoted(value, False) in text or _quoted(value, True) in text
    return json.dumps(value) in text or str(value) in text


def _quoted(text: str, ascii_only: bool) -> str:
    """The inside of the JSON string."""
    return json.dumps(text, ensure_ascii=ascii_only)[1:-1]


def answer_problem(chat: ChatTemplate, message: Message, answer: str, field: str) -> RowError | None:
    """What is wrong with the words of a supervised answer, from the generation prompt's end to its end token."""
    place = 0
    if "reasoning" in message:
        start = find_reasoning(chat, message, answer)
        if start < 0:
            return _dropped_reasoning(chat, message, field)
        place = start + len(message["reasoning"])
    if "tool_calls" in message:
        return call_problem(chat, message, answer, field, whole=True)
    content, start = message["content"].strip(), len(answer)
    if not content:
        return None
    while (start := answer.rfind(content, place, start + len(content) - 1)) >= 0:  # "a" is part of a header, too
        if chat.is_frame(answer[:start], answer[start + len(content) :]):
            return None
    what = f"{chat.name} changes the answer or writes its own words into it"
    return RowError(field, what, ANOTHER_TEMPLATE, _around(content, answer))


def find_reasoning(chat: ChatTemplate, message: Message, answer: str) -> int:
    """Where the reasoning begins in the words of an answer; -1 if nowhere.

    Its words may also stand in the answer or the call: a mark follows where it is the reasoning.
    """
    reasoning = message["reasoning"]
    places = [len(header) for header in (chat.reasoning_header, "") if answer.startswith(header + reasoning)]
    if chat.reasoning_key is not None and reasoning in answer:
        places.append(answer.find(reasoning))
    for place in places:
        behind = answer[place + len(reasoning) :].strip()
        if behind and chat.is_frame("", behind):
            return place
    return -1


def _around(content: str, answer: str) -> str:
    """The piece of the answer that differs, with what the row has there."""
    rows, words = content, answer.strip()
    same = next((place for place in range(len(rows)) if not words.count(rows[: place + 1])), len(rows))
    if same in (0, len(rows)):
        return shown(answer)
    place = words.find(rows[:same]) + same
    start = max(0, same - 15)
    return f"{shown(words[max(0, place - 15) : place + 25])} for {shown(rows[start : same + 25])}"


def _dropped_reasoning(chat: ChatTemplate, message: Message, field: str) -> RowError:
    what, do = f"{chat.name} drops the reasoning of this answer", "remove it from the row"
    if chat.reasoning_key is not None or chat.opened:
        what += ", which it writes only in others"
    elif chat.opening_arg is not None:
        do = f"write data.template_args: {{{chat.opening_arg}}}, or remove it from the row"
    return RowError(f"{field}.reasoning", what, f"{do}, or {ANOTHER_TEMPLATE}", shown(message["reasoning"]))


def call_problem(chat: ChatTemplate, message: Message, text: str, field: str, whole: bool) -> RowError | None:
    """What a template loses or changes of tool calls; `whole`: and of the text beside them."""
    calls, place = message["tool_calls"], f"{field}.tool_calls"
    if len(calls) > 1 and chat.call_end is not None and not chat.parallel_calls:
        what, do = f"{chat.name} writes one call of an answer and drops the others", "write one call a message"
        return RowError(place, what, f"{do}, or {TOOL_TEMPLATES}", f"{len(calls)} calls")
    missing = missing_of_calls(calls, text)
    if missing is None and whole and message["content"].strip() not in text:
        what, do = f"{chat.name} drops the text beside a tool call", f"remove it from the row, or {ANOTHER_TEMPLATE}"
        return RowError(f"{field}.content", what, do, shown(message["content"]))
    if missing is not None:
        return RowError(place, f"{chat.name} drops or changes a tool call", TOOL_TEMPLATES, shown(missing))
    for call in calls:
        if python := python_in(call, text):
            what = f"{chat.name} writes the arguments of a call as Python, not as JSON"
            return RowError(place, what, TOOL_TEMPLATES, shown(python))
    return None


def check_content(chat: ChatTemplate, given: Conversation, text: str, answers: Sequence[Answer]) -> None:
    """Every turn must be in the text, one after the other (a system message anywhere), and so must the tools.

    What an earlier answer wrote beside its calls may be missing: generation is given this text, too.
    """
    supervised = {answer.message: answer for answer in answers}
    end = end_of_calls = 0
    for index, message in enumerate(given.messages):
        chat.clock_of_row.check()
        if answer := supervised.get(index):
            if end > answer.start:
                raise _dropped(chat, given.messages[index - 1], index - 1)
            end = answer.end
        else:
            end = _end_of_turn(chat, given, index, text, end, end_of_calls)
        if message["role"] != "tool":
            end_of_calls = end
    if given.tools:
        _check_tools(chat, given, text)


def _end_of_turn(chat: ChatTemplate, given: Conversation, index: int, text: str, end: int, end_of_calls: int) -> int:
    """Where a turn that is not supervised ends in the text; `end` itself where that cannot be said."""
    message = given.messages[index]
    if message["role"] == "system":
        if message["content"].strip() not in text:
            raise _dropped(chat, message, index)
        return end
    if "tool_calls" in message:  # the words beside a call may stand behind its result (Gemma 4)
        if problem := call_problem(chat, message, text[end:], f"messages[{index}]", whole=False):
            raise problem
        return end
    before = given.messages[:index] if message["role"] == "tool" else []
    found = _find_turn(before, message, text, end, end_of_calls)
    if found < 0:
        raise _dropped(chat, message, index)
    return found


def _find_turn(before: Sequence[Message], message: Message, text: str, end: int, end_of_calls: int) -> int:
    """Where a message ends in `text`; -1 if nowhere. `before`: the turns before it, of a tool's result.

    A result that comes after that of a later call may stand before it: some templates write results in the order of
    their calls. Among equal results it does not matter which is found.
    """
    if message["role"] == "tool":
        earlier = list(takewhile(lambda other: other["role"] == "tool", reversed(before)))
        calls = before[-len(earlier) - 1].get("tool_calls", [])
        order = {call.get("id"): place for place, call in enumerate(calls)}
        place = order.get(message.get("tool_call_id"), len(calls))
        moved = any(order.get(other.get("tool_call_id"), -1) > place for other in earlier)
        if moved and all(other["content"] != message["content"] for other in earlier):
            end = end_of_calls
    return find_content(message, text, end)


def _check_tools(chat: ChatTemplate, given: Conversation, text: str) -> None:
    assert given.tools is not None
    missing = missing_tool(given.tools, text)
    if missing is None and not chat.writes_tools:
        missing = "the same text with and without tools"
    if missing is not None:
        raise RowError("tools", f"{chat.name} drops the tools", TOOL_TEMPLATES, shown(missing))


def _dropped(chat: ChatTemplate, message: Message, index: int) -> RowError:
    what = f"{chat.name} drops or changes the content of the {message['role']} message"
    do = TOOL_TEMPLATES if message["role"] == "tool" else ANOTHER_TEMPLATE
    return RowError(f"messages[{index}]", what, do, shown(message["content"]))
