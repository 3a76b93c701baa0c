"""What a model must write in a conversation, from `apply_chat_template` of transformers alone.

For each supervised answer the prompt is rendered as generation will (`add_generation_prompt`), then the conversation
cut after that answer. The answer is what the second has more, through its end token. Where the prompt opens a block
that the finished text does not have, the answer is the row's reasoning, the closing mark, and what follows the block.
"""

import copy
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from finetune.data.render import IGNORED, LossOn, Renderer, Rendering, TokenizedText
from finetune.data.row_errors import RowError
from finetune.data.types import Conversation
from tests.templates import marked

_SIGN = "qhxr7"


class Family(NamedTuple):
    """What the oracle must know of a family, from reading its template.

    `end` and `call_end` end an answer; `appended`: they open the next turn, and the template writes them only there.
    `reasoning` is the key under which the template reads it; `closing` is how an open block is closed where there is
    no such key. `text_arguments`: the template takes the arguments of calls as JSON text.
    """

    end: str
    call_end: str | None = None
    appended: bool = False
    reasoning: str | None = None
    closing: str | None = None
    text_arguments: bool = False


class Written(NamedTuple):
    """A message's number, the prompt before it, the answer through its end token, and what the template writes then.

    `apart`: prompt and words of the template meet in white space, and so are tokenised apart, in a text of their own.
    """

    message: int
    prompt: str
    answer: str
    rest: str

    apart: bool


class Example(NamedTuple):
    """Token ids and labels."""

    ids: list[int]
    labels: list[int]


class Oracle:
    """Renders one conversation for one tokenizer, family and `data.template_args`."""

    def __init__(self, tokenizer: Any, family: Family, args: dict[str, Any], given: Conversation) -> None:
        self.tokenizer = tokenizer
        self._family = family
        self._args = args
        self._given = given
        self._messages = [self._message(message) for message in given.messages]
        self._written: dict[int, Written] = {}

    def fewest(self, loss_on: LossOn) -> int:
        """How many examples are needed: one text serves every answer that it holds with its prompt, word for word."""
        written, number = [self.written(index) for index in supervised(self._given, loss_on)], 0
        while written:
            number, last = number + 1, written.pop()
            written = [each for each in written if last.apart or not self._holds(last.prompt, each)]
        return number

    def example(self, answers: Sequence[int], train_on_reasoning: bool = True) -> Example:
        """One example with these answers: their messages' numbers."""
        *others, last = [self.written(index) for index in answers]
        ids = self._ids(last.prompt) + self._ids(last.answer) + self._ids(last.rest)
        labels = [IGNORED] * len(ids)
        for each in (*others, last):
            assert each is last or self._holds(last.prompt, each)
            start = len(self._ids(each.prompt))
            end = start + len(self._ids(each.answer))
            labels[start:end] = ids[start:end]
            for place in () if train_on_reasoning else self._reasoning(each):
                labels[start + place] = IGNORED
        return Example(ids, labels)

    def _reasoning(self, written: Written) -> list[int]:
        """Which tokens of an answer hold characters of its reasoning."""
        reasoning = self._given.messages[written.message].get("reasoning")
        if reasoning is None:
            return []
        start = self._write(written.message, _SIGN).answer.index(_SIGN)
        end = start + len(reasoning)
        assert written.answer[start:end] == reasoning
        spans = self.tokenizer(written.answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return [place for place, (first, last) in enumerate(spans) if first < end and last > start]

    def written(self, index: int) -> Written:
        """What generation is given for answer `index`, and what it must write."""
        if index not in self._written:
            self._written[index] = self._write(index)
        return self._written[index]

    def _write(self, index: int, reasoning: str | None = None) -> Written:
        """The same, with another reasoning if one is given."""
        message, family = self._messages[index], self._family
        if reasoning is not None:
            message = {**message, family.reasoning or "reasoning": reasoning}
        prompt = self._text(self._messages[:index], True)
        end = family.call_end if message.get("tool_calls") else family.end
        assert end is not None
        whole = self._text([*self._messages[:index], message])
        if not whole.startswith(prompt):
            whole = self._unlike(prompt, whole, index, message)
        answer = whole[len(prompt) :]
        rest = ""
        if not family.appended:
            answer, found, rest = answer.rpartition(end)
            assert found, (end, whole)
        given = self._given.messages[index]
        apart = prompt[-1:].isspace() and answer[:1].isspace() and not answer.startswith(given["content"] or "\0")
        written = Written(index, prompt, answer + end, rest, apart)
        if reasoning is not None:
            return written
        lost = [key for key in ("content", "reasoning") if str(given.get(key, "")).strip() not in answer]
        assert not lost, (lost, answer)
        return written

    def _unlike(self, prompt: str, whole: str, index: int, message: dict[str, Any]) -> str:
        """The finished text where it does not begin with the prompt."""
        family = self._family
        if family.closing is not None:
            start = prompt.rindex("<think>")
            assert whole.startswith(prompt[:start])
            return prompt + (message.get("reasoning") or "") + family.closing + whole[start:]
        assert family.reasoning is not None
        signed = self._text([*self._messages[:index], {**message, family.reasoning: _SIGN}])
        if signed.startswith(prompt + _SIGN):
            return prompt + (message.get(family.reasoning) or "") + signed[len(prompt + _SIGN) :]
        # Without earlier reasoning, and words beside calls, both are alike: they are dropped once the answer is there.
        bare = [
            {**each, family.reasoning: "", **({"content": ""} if each.get("tool_calls") else {})}
            for each in self._messages[:index]
        ]
        whole = self._text([*bare, message])
        assert whole.startswith(self._text(bare, True)), whole
        return prompt + whole[len(self._text(bare, True)) :]

    def _message(self, message: Any) -> dict[str, Any]:
        """The message as the template takes it."""
        taken = copy.deepcopy(message)
        if "reasoning" in taken and self._family.reasoning is not None:
            taken[self._family.reasoning] = taken.pop("reasoning")
        for call in taken.get("tool_calls", ()) if self._family.text_arguments else ():
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return dict(taken)

    def _text(self, messages: Sequence[dict[str, Any]], generation: bool = False) -> str:
        text = self.tokenizer.apply_chat_template(
            list(messages), tools=self._given.tools, add_generation_prompt=generation, tokenize=False, **self._args
        )
        assert isinstance(text, str)
        return text

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _holds(self, prompt: str, other: Written) -> bool:
        """Whether a prompt holds another prompt and its answer, as text and as tokens."""
        if not prompt.startswith(other.prompt + other.answer) or other.apart:
            return False
        ids = self._ids(other.prompt) + self._ids(other.answer)
        return self._ids(prompt)[: len(ids)] == ids


def supervised(given: Conversation, loss_on: LossOn) -> list[int]:
    """The answers that `loss_on` names."""
    roles = [message["role"] for message in given.messages]
    answers = [index for index, role in enumerate(roles) if role == "assistant"]
    if loss_on == "last_assistant":
        return answers[-1:]
    if loss_on == "completion":
        last_user = max(index for index, role in enumerate(roles) if role == "user")
        return [index for index in answers if index > last_user]
    return answers


def tokens_of(renderer: Renderer, renderings: Sequence[Rendering]) -> list[TokenizedText]:
    """The tokens of each example; raises the first error."""
    found = renderer.tokenise(renderings)
    for tokens in found:
        if isinstance(tokens, RowError):
            raise tokens
    return [tokens for tokens in found if isinstance(tokens, TokenizedText)]


def check_examples(
    renderer: Renderer, given: Conversation, loss_on: LossOn, oracle: Oracle, train_on_reasoning: bool = True
) -> None:
    """Every answer is supervised once, in as few examples as can be; ids and labels are the oracle's."""
    renderings = renderer.examples(given)
    groups = [[answer.message for answer in rendering.answers] for rendering in renderings]
    assert sorted(index for group in groups for index in group) == supervised(given, loss_on)
    assert len(groups) == oracle.fewest(loss_on)
    for found, group in zip(tokens_of(renderer, renderings), groups, strict=True):
        expected = oracle.example(group, train_on_reasoning)
        if (found.input_ids.tolist(), found.labels.tolist()) != (expected.ids, expected.labels):
            pieces = marked(oracle.tokenizer, found.input_ids.tolist(), found.labels.tolist())
            assert pieces == marked(oracle.tokenizer, expected.ids, expected.labels)
            raise AssertionError("the same text, cut into other tokens")
