"""The positions of the answers in a rendered conversation, and whether the template writes all of its content.

Templates silently drop what they do not know, tools and tool calls above all.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from finetune.data.render.call_arguments import python_in
from finetune.data.render.chat_template import ChatTemplate
from finetune.data.render.sandbox import ANOTHER_TEMPLATE
from finetune.data.row_errors import RowError, shown
from finetune.data.types import Answer, Conversation, Message, ToolCall
from finetune.recipe.settings import LossOn

_OTHERS: tuple[LossOn, ...] = ("last_assistant", "completion")
TOOL_TEMPLATES = "name a template with tool support in data.chat_template: chatml, mistral-v3, mistral-v3-tekken"


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


def find_answers(chat: ChatTemplate, given: Conversation, loss_on: LossOn) -> tuple[str, tuple[Answer, ...]]:
    """The rendered conversation and its supervised turns; `RowError` where that cannot be done for sure."""
    messages = given.messages
    indices = supervised(messages, loss_on)
    text, prompts = chat.text_and_prompts(messages, given.tools, indices)
    answers = {index: _answer(chat, given, index, text, prompt) for index, prompt in zip(indices, prompts, strict=True)}
    _check_content(chat, given, text, answers)
    return text, tuple(answers.values())


def supervised(messages: Sequence[Message], loss_on: LossOn) -> list[int]:
    """The turns that `loss_on` supervises, those with `train: False` excepted; `RowError` if none is left."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if loss_on == "last_assistant":
        answers = answers[-1:]
    elif loss_on == "completion":
        users = [index for index, message in enumerate(messages) if message["role"] == "user"]
        answers = [index for index in answers if not users or index > users[-1]]
    answers = [index for index in answers if messages[index].get("train") is not False]
    if not answers and (loss_on != "all" or all(message.get("train") is False for message in messages)):
        what = f"nothing is supervised: data.loss_on is {loss_on}"
        roles = [message["role"] + " (train: false)" * (message.get("train") is False) for message in messages]
        got = shown(roles[-6:], limit=200)
        raise RowError("messages", what, "remove the row, or supervise one of its turns", got)
    return answers


def find_holes(chat: ChatTemplate, given: Conversation, text: str) -> tuple[tuple[int, int], ...]:
    """The characters of the turns with `train: False`: what the template writes more with them than without."""
    holes = []
    for index, message in enumerate(given.messages):
        if message.get("train") is False:
            before = chat.text(given.messages[:index], given.tools) if index else ""
            until = chat.text(given.messages[: index + 1], given.tools)
            if not (text.startswith(until) and until.startswith(before)):
                raise _differently(chat, given, index, text, until)
            holes.append((len(before), len(until)))
    return tuple(holes)


def template_problems(chat: ChatTemplate, question: Message, answer: Message) -> list[RowError]:
    """Everything for which no answer could be supervised, seen in one question and its answer."""
    given = Conversation([question, answer])
    try:
        text, [start] = chat.text_and_prompts(given.messages, None, [1])
    except RowError as error:
        return [error]
    return _answer_problems(chat, given, 1, text, start)


def _answer(chat: ChatTemplate, given: Conversation, index: int, text: str, start: int | str) -> Answer:
    """The place of answer `index`: behind what generation would be given, through its EOS."""
    message = given.messages[index]
    if isinstance(start, str):
        raise _differently(chat, given, index, text, start)
    if problems := _answer_problems(chat, given, index, text, start):
        raise problems[0]
    end = text.find(chat.eos, start)
    if "tool_calls" in message:
        _check_calls(chat, message, text[start:end], f"messages[{index}]")
    return Answer(index, start, end + len(chat.eos))


def _answer_problems(
    chat: ChatTemplate, given: Conversation, index: int, text: str, prompt: int | str
) -> list[RowError]:
    """What is wrong with an answer: its prompt, its end, its words."""
    message, field, problems = given.messages[index], f"messages[{index}]", []
    if isinstance(prompt, str):
        problems.append(_differently(chat, given, index, text, prompt))
    start = _common(text, prompt) if isinstance(prompt, str) else prompt
    end = text.find(chat.eos, start)
    is_last = index == len(given.messages) - 1
    if end < 0 or (is_last and text[end + len(chat.eos) :].strip()) or _runs_on(chat, given, index, text, end):
        what = f"{chat.name} does not end an answer with the EOS token {chat.eos}"
        do = f"{ANOTHER_TEMPLATE}: the model would never learn to stop"
        problems.append(RowError(field, what, do, shown(text[start:][-60:])))
    answer = text[start:end] if end >= 0 else text[start:]
    if "tool_calls" not in message and answer.strip() != message["content"].strip():
        what = f"{chat.name} changes the answer or writes its own words into it"
        problems.append(RowError(field, what, ANOTHER_TEMPLATE, shown(answer)))
    return problems


def _runs_on(chat: ChatTemplate, given: Conversation, index: int, text: str, end: int) -> bool:
    """Whether the EOS found for a call is that of a later turn: a template may end calls with another token.

    A text answer need not be asked: it is compared word for word.
    """
    if "tool_calls" not in given.messages[index] or index == len(given.messages) - 1:
        return False
    return not chat.text(given.messages[: index + 1], given.tools).startswith(text[: end + len(chat.eos)])


def _differently(chat: ChatTemplate, given: Conversation, index: int, text: str, prompt: str) -> RowError:
    """The error of a prompt that does not stand in the text, with the `loss_on` that would do without it."""
    what = f"{chat.name} renders what comes before an answer differently once the answer is there"
    rest = prompt[_common(text, prompt) :]
    if rest and prompt.removesuffix(rest).strip() and len(rest) < 40:
        what += f": only generation is given {shown(rest)}"
    helping = [choice for choice in _OTHERS if _can_do(chat, given, index, choice)]
    do = ANOTHER_TEMPLATE
    if helping:
        do += f", or with method.kind: sft set data.loss_on to {' or '.join(helping)}"
    return RowError(f"messages[{index}]", what, do, shown(prompt[-50:], limit=100))


def _common(one: str, other: str) -> int:
    """How many characters both begin with."""
    length = min(len(one), len(other))
    return next((place for place in range(length) if one[place] != other[place]), length)


def _can_do(chat: ChatTemplate, given: Conversation, index: int, loss_on: LossOn) -> bool:
    """Whether the row could be learned with this `loss_on`, which leaves out answer `index`."""
    try:
        indices = supervised(given.messages, loss_on)
        prompts = [] if index in indices else chat.text_and_prompts(given.messages, given.tools, indices)[1]
    except RowError:
        return False
    return bool(prompts) and all(isinstance(prompt, int) for prompt in prompts)


def _check_calls(chat: ChatTemplate, message: Message, text: str, field: str) -> None:
    missing = missing_of_calls(message["tool_calls"], text)
    if missing is None and message["content"].strip() not in text:
        missing = message["content"]
    if missing is not None:
        what = f"{chat.name} drops or changes a tool call"
        raise RowError(f"{field}.tool_calls", what, TOOL_TEMPLATES, shown(missing))
    for call in message["tool_calls"]:
        if python := python_in(call, text):
            what = f"{chat.name} writes the arguments of a call as Python, not as JSON"
            raise RowError(f"{field}.tool_calls", what, TOOL_TEMPLATES, shown(python))


def _check_content(chat: ChatTemplate, given: Conversation, text: str, answers: dict[int, Answer]) -> None:
    """Every turn must be in the text, one after the other (a system message anywhere), and so must the tools."""
    end = 0
    for index, message in enumerate(given.messages):
        answer, field = answers.get(index), f"messages[{index}]"
        if answer is not None:
            if end > answer.start:
                raise _dropped(chat, given.messages[index - 1], index - 1)
            end = answer.end
        elif message["role"] == "system":
            if message["content"].strip() not in text:
                raise _dropped(chat, message, index)
        else:
            end = find_content(message, text, end)
            if end < 0:
                raise _dropped(chat, message, index)
            if "tool_calls" in message:
                _check_calls(chat, message, text[end:], field)
    if given.tools:
        _check_tools(chat, given, text)


def _check_tools(chat: ChatTemplate, given: Conversation, text: str) -> None:
    assert given.tools is not None
    missing = missing_tool(given.tools, text)
    if missing is None and _same_without_tools(chat, given, text):
        missing = "the same text with and without tools"
    if missing is not None:
        raise RowError("tools", f"{chat.name} drops the tools", TOOL_TEMPLATES, shown(missing))


def _same_without_tools(chat: ChatTemplate, given: Conversation, text: str) -> bool:
    try:
        return chat.text(given.messages) == text
    except RowError:
        return False


def _dropped(chat: ChatTemplate, message: Message, index: int) -> RowError:
    what = f"{chat.name} drops or changes the content of the {message['role']} message"
    do = TOOL_TEMPLATES if message["role"] == "tool" else ANOTHER_TEMPLATE
    return RowError(f"messages[{index}]", what, do, shown(message["content"]))
