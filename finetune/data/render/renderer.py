"""A row -> text -> token ids and labels, through the tokenizer's chat template.

Supervised tokens are found by rendering prefixes, as generation does it: the conversation up to an answer, with the
generation prompt, must be a prefix of the whole, as text and as token ids. The answer's tokens up to and with the EOS
are supervised; what the template writes after the EOS is not. No template needs `{% generation %}` tags, and one
for which this does not hold is rejected.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, get_args

import numpy as np

from finetune.data.render.answers import find_answers, find_holes, template_problems
from finetune.data.render.chat_template import (
    PROBE,
    PROBE_TURNS,
    ChatTemplate,
    System,
    by_first_character,
    control_tokens,
    find_token,
)
from finetune.data.render.encoder import Encoder, own_bos
from finetune.data.row_errors import RowError, shown
from finetune.data.types import IGNORED, Answer, Conversation, Document, Ints, Message, Rendering, TokenizedText
from finetune.errors import DataError, Problem
from finetune.recipe.settings import LossOn

LOSSES: tuple[LossOn, ...] = get_args(LossOn)


class Renderer:
    """Renders rows for one fast tokenizer; `name` is what messages call its chat template.

    Text is tokenised without special tokens added, as `apply_chat_template` does at inference: the template alone
    decides whether there is a BOS, so there is never a second one. A `Document` has no template; it gets the BOS that
    the tokenizer itself would add, and an EOS. One thread may render while others tokenise.

    `loss_on`: every answer (`assistant`), only the last one, every answer after the last user message (`completion`:
    tool calls and what follows them), or `all` tokens but a row's first. `train: False` takes a turn out of any.
    Raises `DataError` for a template that cannot work for any row.
    """

    def __init__(self, tokenizer: Any, name: str, loss_on: LossOn = "assistant", system: System = "error") -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._loss_on = loss_on
        self._system = system
        self._control = control_tokens(tokenizer)
        self._by_first = by_first_character(self._control)
        self._encoder = Encoder(tokenizer, self._control)
        self._eos_id: int = tokenizer.eos_token_id
        self._bos = own_bos(tokenizer)
        self._checked = False
        if loss_on != "all":  # there may be no conversation otherwise, and no template
            self._check_template()

    def render(self, example: Conversation | Document) -> Rendering:
        """One row as text with its supervised places; `RowError` if they cannot be found for certain."""
        if isinstance(example, Document):
            return self._document(example)
        if not self._checked:
            self._check_template()
        given = self._chat.conversation(example)
        merged = len(example.messages) - len(given.messages)
        try:
            rendering = self._conversation(given)
        except RowError as error:
            raise _as_given(error, merged) from error
        self._encoder.alphabet.check(rendering.text)
        if not merged:
            return rendering
        answers = tuple(answer._replace(message=answer.message + merged) for answer in rendering.answers)
        return Rendering(rendering.text, answers, rendering.everything, rendering.holes)

    def tokenise(self, renderings: Sequence[Rendering]) -> list[TokenizedText | RowError]:
        """Ids and labels of each, or why not; one call of the Rust tokenizer, which lets other threads run."""
        texts = [rendering.text for rendering in renderings]
        rows = self._encoder.ids(texts)
        starts = [[answer.start for answer in rendering.answers] for rendering in renderings]
        borders = self._encoder.prompt_borders(texts, rows, starts)
        return [self._labelled(*row) for row in zip(renderings, rows, borders, strict=True)]

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer, self._name, self._system)

    def _check_template(self) -> None:
        """Refuse a template that cannot work for any row, once and by its name; learn how its prompts end."""
        chat, self._checked = self._chat, True
        question, answer = PROBE_TURNS
        problems = template_problems(chat, question, answer)
        if not problems:
            problems = self._probe_problems(Conversation([question, answer]))
        if problems:
            raise DataError([Problem("data.chat_template", error.what, error.do, error.got) for error in problems])
        self._encoder.learn(chat.text([question], generation=True), PROBE)
        result = Message(role="tool", content="probe-7351", tool_call_id="abcdefghi", name="probe")
        calls: list[Any] = [{"type": "function", "id": "abcdefghi", "function": {"name": "probe", "arguments": {}}}]
        called = Message(role="assistant", content="", tool_calls=calls)
        try:
            self._encoder.learn(chat.text([question, called, result], generation=True), "probe-7351")
        except RowError:
            return  # no tools, then

    def _probe_problems(self, probe: Conversation) -> list[RowError]:
        try:
            rendered = self.tokenise([self._conversation(probe)])[0]
        except RowError as error:
            return [error]
        return [rendered] if isinstance(rendered, RowError) else []

    def _document(self, document: Document) -> Rendering:
        token = find_token(document.text, self._by_first)
        if token is not None:
            what = f"contains the control token {token}, which would be read as such"
            rendered = "format: rendered" + ("" if self._loss_on == "all" else " with response_template")
            do = f"write {rendered} if it is meant as such, or remove it or write it differently"
            raise RowError("text", what, do, shown(document.text))
        if self._loss_on != "all":
            do = "set data.loss_on to all, or name a format with turns in the source"
            raise RowError("text", f"plain text has no answer, and data.loss_on is {self._loss_on}", do)
        self._encoder.alphabet.check(document.text)
        return Rendering(document.text, everything=True, document=True)

    def _conversation(self, given: Conversation) -> Rendering:
        text, answers = find_answers(self._chat, given, self._loss_on)
        if self._loss_on != "all":
            return Rendering(text, answers)
        return Rendering(text, answers, everything=True, holes=find_holes(self._chat, given, text))

    def _labelled(self, rendering: Rendering, ids: Ints, borders: Sequence[int | None]) -> TokenizedText | RowError:
        if rendering.document:
            ids = np.array([*self._bos, *ids.tolist(), self._eos_id], dtype=np.int32)
        labels = ids.copy() if rendering.everything else np.full(len(ids), IGNORED, dtype=np.int32)
        for answer, start in zip(rendering.answers, borders, strict=True):
            if start is None:
                return self._straddled(rendering, ids, answer)
            if not rendering.everything:
                # Contents cannot contain the EOS, so the next one is the answer's own end.
                length = int(np.argmax(ids[start:] == self._eos_id)) + 1 if start < len(ids) else 0
                if not length or ids[start + length - 1] != self._eos_id:
                    what = f"the tokenizer does not read {self._tokenizer.eos_token} as one token"
                    return RowError(f"messages[{answer.message}]", what, "fix its tokenizer.json")
                labels[start : start + length] = ids[start : start + length]
        if rendering.everything:
            labels[:1] = IGNORED
            self._ignore_holes(rendering, labels)
        return TokenizedText(ids, labels)

    def _ignore_holes(self, rendering: Rendering, labels: Ints) -> None:
        if not rendering.holes:
            return
        spans = np.array(self._encoder.spans(rendering.text), dtype=np.int64).reshape(-1, 2)
        for start, end in rendering.holes:
            labels[(spans[:, 0] < end) & (spans[:, 1] > start)] = IGNORED

    def _straddled(self, rendering: Rendering, ids: Ints, answer: Answer) -> RowError:
        what = "a token straddles the border between prompt and answer, so generation would begin differently"
        do = "remove the white space at the answer's beginning, or name another one in data.chat_template"
        prompt = self._encoder.ids([rendering.text[: answer.start]])[0]
        differ = next((i for i, token in enumerate(prompt) if i >= len(ids) or ids[i] != token), len(prompt))
        got = self._tokenizer.decode(ids[differ : differ + 1])
        return RowError(f"messages[{answer.message}].content", what, do, shown(got))


def _as_given(error: RowError, merged: int) -> RowError:
    """The error with the row's own message numbers, after `merged` messages were put into another one."""
    if merged and error.field and error.field.startswith("messages["):
        number, _, rest = error.field.removeprefix("messages[").partition("]")
        error.field = f"messages[{int(number) + merged}]{rest}"
    return error
