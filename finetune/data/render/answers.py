"""A conversation -> the texts that it is trained as, each with its supervised answers.

An answer is what the model must write: what the template, given the conversation up to and with this turn, writes
behind the generation prompt, through the end token. One text is used for several answers where it holds the prompt and
the words of each; where a template rewrites earlier turns (think blocks are dropped, the end of the last answer is
another one) a conversation becomes several examples.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from finetune.data.render.chat_template import ChatTemplate
from finetune.data.render.compiled_template import Prompt, with_placeholder
from finetune.data.render.content_checks import answer_problem, check_content, find_reasoning
from finetune.data.render.ends import common_length
from finetune.data.render.reasoning import (
    CLOSE,
    PLACEHOLDER,
    closed_block,
    closing_mark,
    inline_reasoning,
    opened_block,
    without_empty_block,
)
from finetune.data.render.sandbox import ANOTHER_TEMPLATE
from finetune.data.row_errors import RowError, shown
from finetune.data.types import Answer, Conversation, Message
from finetune.recipe.settings import LossOn

_UNKNOWN_END = re.compile(r"<\|[^<>|\s]+\|>\Z")
_OTHERS: tuple[LossOn, ...] = ("assistant", "last_assistant", "completion")


class Example(NamedTuple):
    """A text and the answers in it that are supervised."""

    text: str
    answers: tuple[Answer, ...]


class _Cut(NamedTuple):
    """A conversation that ends with one answer: the generation prompt, what follows it, and the answer in that text."""

    prompt: str
    rest: str
    answer: Answer

    @property
    def text(self) -> str:
        """The whole of it."""
        return self.prompt + self.rest

    def stands_in(self, text: str) -> bool:
        """Whether a text begins with this prompt and the words of this answer."""
        return text.startswith(self.text[: self.answer.end])


def find_examples(chat: ChatTemplate, given: Conversation, loss_on: LossOn) -> list[Example]:
    """The texts of a conversation with their supervised turns; `RowError` where that cannot be done for sure."""
    indices = supervised(given.messages, loss_on)
    text, prompts = chat.text_and_prompts(given.messages, given.tools, indices)
    if all(prompt.proven for prompt in prompts):
        answers, text = _proven_answers(chat, given, indices, prompts, text)
        if not any(answer.alone for answer in answers):
            check_content(chat, given, text, answers)
            return [Example(text, answers)]
    cuts = []
    for index, prompt in zip(indices, prompts, strict=True):
        chat.clock_of_row.check()
        cuts.append(_cut(chat, given, index, prompt, text, loss_on))
    if loss_on == "all":
        return [_as_one(chat, given, text, cuts)]
    examples = []
    while cuts:
        chat.clock_of_row.check()
        text = cuts[-1].text
        held = [cut for cut in cuts if cut is cuts[-1] or (cut.stands_in(text) and not _alone(cut, cuts[-1]))]
        answers = tuple(cut.answer for cut in held)
        cuts = [cut for cut in cuts if cut.answer not in answers]
        check_content(chat, replace(given, messages=given.messages[: answers[-1].message + 1]), text, answers)
        examples.append(Example(text, answers))
    return examples[::-1]


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
            chat.clock_of_row.check()
            before = chat.text(given.messages[:index], given.tools) if index else ""
            until = chat.text(given.messages[: index + 1], given.tools)
            if not (text.startswith(until) and until.startswith(before)):
                raise _differently(chat, given, index, text, until, "all")
            holes.append((len(before), len(until)))
    return tuple(holes)


def template_problems(chat: ChatTemplate, question: Message, answer: Message) -> list[RowError]:
    """Everything for which no answer could be supervised, seen in one question and its answer."""
    given, problems = Conversation([question, answer]), []
    try:
        text, [prompt] = chat.text_and_prompts(given.messages, None, [1])
    except RowError as error:
        return [error]
    try:
        rest = _rest(chat, given, 1, text[: prompt.end] if prompt.end is not None else prompt.text, text, "assistant")
    except RowError as error:
        problems.append(error)
        rest = text[common_length(text, prompt.text) :]
    _, found = _located(chat, given, 1, "", rest)
    return problems + found


def _proven_answers(
    chat: ChatTemplate, given: Conversation, indices: Sequence[int], prompts: Sequence[Prompt], text: str
) -> tuple[tuple[Answer, ...], str]:
    """The answers in the text of the whole conversation, and the text, with the end of its last answer."""
    answers = []
    for index, prompt in zip(indices, prompts, strict=True):
        assert prompt.end is not None
        answer = _plain(chat, given.messages[index], index, text, prompt.end)
        if answer is None:
            is_last = index == len(given.messages) - 1
            cut, problems = _located(chat, given, index, text[: prompt.end], text[prompt.end :], is_last)
            if problems:
                raise problems[0]
            assert cut is not None
            answer, text = cut.answer, cut.text
            if "tool_calls" in given.messages[index] and not is_last:
                _check_runs_on(chat, given, index, text[: answer.end])
        answers.append(answer)
    return tuple(answers), text


def _plain(chat: ChatTemplate, message: Message, index: int, text: str, start: int) -> Answer | None:
    """The answer where it is nothing but the content and its end: most are, and `_located` costs more."""
    ending = chat.text_end
    if ending is None or chat.prompt_alone or "tool_calls" in message or "reasoning" in message:
        return None
    content = message["content"]
    end = start + len(content)
    if content[:1].isspace() or not content or CLOSE in content or not text.startswith(ending.token, end):
        return None
    return Answer(index, start, end + len(ending.token), ending.token) if text.startswith(content, start) else None


def _cut(chat: ChatTemplate, given: Conversation, index: int, prompt: Prompt, text: str, loss_on: LossOn) -> _Cut:
    """The conversation up to and with answer `index`, as generation would see and write it; `text`: all of it."""
    before = text[: prompt.end] if prompt.end is not None else prompt.text
    is_last = index == len(given.messages) - 1
    written = text if is_last else chat.text(given.messages[: index + 1], given.tools)
    cut, problems = _located(chat, given, index, before, _rest(chat, given, index, before, written, loss_on))
    if problems:
        raise problems[0]
    assert cut is not None
    return cut


def _rest(chat: ChatTemplate, given: Conversation, index: int, prompt: str, text: str, loss_on: LossOn) -> str:
    """What the model writes behind the prompt, and what the template writes after that.

    A block of reasoning that the prompt opens and the text does not have is filled with the row's reasoning, if any.
    """
    if text.startswith(prompt):
        return text[len(prompt) :]
    message, opened = given.messages[index], opened_block(prompt)
    if opened and "reasoning" not in message and chat.reasoning_key:
        turns = [*given.messages[:index], with_placeholder(message)]
        written = chat.text(turns, given.tools)
        if written.startswith(prompt) and PLACEHOLDER in written[len(prompt) :]:
            return written[len(prompt) :].replace(PLACEHOLDER, "", 1)
    turns = [*map(_without_analysis, given.messages[:index]), message]
    if turns[:-1] != given.messages[:index]:
        # gpt-oss gives generation the reasoning before a call, and drops it once the answer is there.
        bare, written = chat.text(turns[:-1], given.tools, generation=True), chat.text(turns, given.tools)
        if written.startswith(bare):
            return written[len(bare) :]
    before, reasoning = prompt.removesuffix(opened), message.get("reasoning", "")
    is_written = chat.reasoning_key is not None and reasoning and reasoning in text[len(before) :]
    if opened and text.startswith(before) and not is_written:
        return reasoning + closing_mark(opened) + without_empty_block(text[len(before) :], opened)
    before = prompt.removesuffix(closed_block(prompt))
    if before != prompt and not reasoning and text.startswith(before):
        return text[len(before) :]  # the prompt says that there is no reasoning, and a finished answer does not
    raise _differently(chat, given, index, text, prompt, loss_on)


def _without_analysis(message: Message) -> Message:
    """An earlier turn without its reasoning, and without what it says beside calls."""
    bare: Message = {**message}
    bare.pop("reasoning", None)
    if "tool_calls" in message:
        bare["content"] = ""
    return bare


def _located(
    chat: ChatTemplate, given: Conversation, index: int, prompt: str, rest: str, is_last: bool = True
) -> tuple[_Cut | None, list[RowError]]:
    """The answer at the beginning of `rest`, and what is wrong with it: its end, its words."""
    message, field, problems = given.messages[index], f"messages[{index}]", []
    ending = chat.end_of(message)
    end = -1 if ending is None else rest.find(ending.token)
    if end < 0 and ending is not None and ending.appended and is_last:
        rest += ending.appended
        end = rest.find(ending.token)
    if end < 0:
        problems.append(_unended(chat, field, rest))
    words = rest if end < 0 else rest[:end]
    if problem := answer_problem(chat, message, words, field):
        problems.append(problem)
    if end < 0 or ending is None:
        return None, problems
    start = len(prompt)
    span = _reasoning_span(chat, message, words, start)
    rows_own = message["content"][:1].isspace() and rest.startswith(message["content"])
    alone = chat.prompt_alone or (prompt[-1:].isspace() and rest[:1].isspace() and not rows_own)
    answer = Answer(index, start, start + end + len(ending.token), ending.token, span, alone)
    return _Cut(prompt, rest, answer), problems


def _unended(chat: ChatTemplate, field: str, text: str) -> RowError:
    """The error of an answer without an end; it may be a token that the vocabulary lacks."""
    what = f"{chat.name} does not end an answer with the EOS token {chat.eos}"
    do = f"{ANOTHER_TEMPLATE}: the model would never learn to stop"
    if (end := _UNKNOWN_END.search(text.rstrip())) and end[0] not in chat.control:
        do = f'write model.added_tokens: ["{end[0]}"] and model.eos_token: "{end[0]}", or {do}'
    return RowError(field, what, do, shown(text[-60:]))


def _reasoning_span(chat: ChatTemplate, message: Message, words: str, start: int) -> tuple[int, int] | None:
    """The characters of the reasoning in an answer that begins at `start`; a `<think>` block in its text is some."""
    if "reasoning" in message:
        place = start + find_reasoning(chat, message, words)
        return place, place + len(message["reasoning"])
    if (written := inline_reasoning(message["content"])) and written in words:
        place = start + words.find(written)
        return place, place + len(written)
    return None


def _alone(cut: _Cut, last: _Cut) -> bool:
    """Whether one of them needs a text of its own, where its prompt is tokenised by itself."""
    return cut.answer.alone or last.answer.alone


def _as_one(chat: ChatTemplate, given: Conversation, text: str, cuts: Sequence[_Cut]) -> Example:
    """The whole conversation as one text, which must hold every answer as generation would write it."""
    is_last = bool(cuts) and cuts[-1].answer.message == len(given.messages) - 1
    text = cuts[-1].text if is_last else text
    for cut in cuts:
        if not cut.stands_in(text):
            raise _differently(chat, given, cut.answer.message, text, cut.text, "all")
    answers = tuple(cut.answer for cut in cuts)
    check_content(chat, given, text, answers)
    return Example(text, answers)


def _check_runs_on(chat: ChatTemplate, given: Conversation, index: int, until: str) -> None:
    """Raise `RowError` where the end found for a call is that of a later turn.

    A text answer need not be asked: its content is found before its end, and the next turn's behind it.
    """
    if chat.text_end_is_appended:
        return
    if not chat.text(given.messages[: index + 1], given.tools).startswith(until):
        raise _unended(chat, f"messages[{index}]", until)


def _differently(
    chat: ChatTemplate, given: Conversation, index: int, text: str, prompt: str, loss_on: LossOn
) -> RowError:
    """The error of a prompt that does not stand in the text, with the `loss_on` that would do without it."""
    message, field = given.messages[index], f"messages[{index}]"
    if "reasoning" in message and chat.closes_block(prompt):
        what = "has reasoning, and the generation prompt closes the block for it"
        given_args = ", ".join(f"{key}: {json.dumps(value)}" for key, value in chat.args.items())
        change = f"change data.template_args ({given_args or 'none'})"
        if chat.opening_arg is not None:
            change = f"write data.template_args: {{{chat.opening_arg}}}"
        do = f"remove it from the row, or {change}"
        return RowError(f"{field}.reasoning", what, do, shown(message["reasoning"]))
    what = f"{chat.name} renders what comes before an answer differently once the answer is there"
    place = common_length(text, prompt)
    opening = prompt.rfind("<", 0, place)
    if opening >= 0 and ">" not in prompt[opening:place]:
        place = opening  # a mark as a whole
    rest = prompt[place:]
    if rest and prompt.removesuffix(rest).strip() and len(rest) < 40:
        what += f": only generation is given {shown(rest)}"
    helping = [choice for choice in _OTHERS if choice != loss_on and _can_do(chat, given, index, choice, loss_on)]
    do = ANOTHER_TEMPLATE
    if helping:
        do += f", or with method.kind: sft set data.loss_on to {' or '.join(helping)}"
    return RowError(field, what, do, shown(prompt[-50:], limit=100))


def _can_do(chat: ChatTemplate, given: Conversation, index: int, loss_on: LossOn, current: LossOn) -> bool:
    """Whether the row could be learned with this `loss_on`."""
    try:
        if current != "all" and index in supervised(given.messages, loss_on):
            return False
        return bool(find_examples(chat, given, loss_on))
    except RowError:
        return False
