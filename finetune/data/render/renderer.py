"""A row -> texts -> token ids and labels, through the tokenizer's chat template.

Supervised is what the model must write at inference: everything between the generation prompt, rendered with the same
template variables, and the end of the answer, through its end token; what the template writes after that is not. The
generation prompt stands before it exactly, as text and as token ids. No template needs `{% generation %}` tags, and one
for which this does not hold is rejected.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any, get_args

import numpy as np

from finetune.data.render.answers import find_examples, find_holes
from finetune.data.render.chat_template import PROBE, PROBE_TURNS, ChatTemplate, System
from finetune.data.render.control_tokens import by_first_character, control_tokens, find_token
from finetune.data.render.encoder import TOO_MANY, Encoder, own_bos
from finetune.data.render.sandbox import template_problem
from finetune.data.render.template_checks import problems_of_template
from finetune.data.row_errors import RowError, shown
from finetune.data.types import IGNORED, Answer, Conversation, Document, Ints, Message, Rendering, TokenizedText
from finetune.errors import DataError
from finetune.recipe.settings import LossOn

LOSSES: tuple[LossOn, ...] = get_args(LossOn)


class Renderer:
    """Renders rows for one fast tokenizer; `name` is what messages call its chat template.

    Text is tokenised without special tokens added, as `apply_chat_template` does at inference: the template alone
    decides whether there is a BOS, so there is never a second one. A `Document` has no template; it gets the BOS that
    the tokenizer itself would add, and an EOS. One thread may render while others tokenise.

    `loss_on`: every answer (`assistant`), only the last one, every answer after the last user message (`completion`:
    tool calls and what follows them), or `all` tokens but a row's first. `train: False` takes a turn out of any.
    `train_on_reasoning`: whether the text of an answer's reasoning is supervised.
    Raises `DataError` for a template that cannot work for any row.
    """

    def __init__(
        self,
        tokenizer: Any,
        name: str,
        loss_on: LossOn = "assistant",
        system: System = "error",
        train_on_reasoning: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._loss_on = loss_on
        self._system = system
        self._train_on_reasoning = train_on_reasoning
        self._control = control_tokens(tokenizer)
        self._by_first = by_first_character(self._control)
        self._encoder = Encoder(tokenizer, self._control)
        self._eos_id: int = tokenizer.eos_token_id
        self._bos = own_bos(tokenizer)
        self._ids: dict[str, int] = {}
        self._checked = False
        if loss_on != "all":  # there may be no conversation otherwise, and no template
            self._check_template()

    def render(self, example: Conversation | Document) -> Rendering:
        """One row as one text; `RowError` where it must be several, or its supervised places cannot be found."""
        first, *others = self.examples(example)
        if others:
            what = f"{self._name} rewrites earlier answers, and two answers are compared in one text each"
            do = "let each answer be one message of the assistant, or name another one in data.chat_template"
            raise RowError("messages", what, do, f"{len(others) + 1} texts")
        return first

    def examples(self, example: Conversation | Document) -> tuple[Rendering, ...]:
        """The texts that a row is trained as, with their supervised places: one, unless earlier answers are rewritten.

        `RowError` if the places cannot be found for certain.
        """
        if isinstance(example, Document):
            return (self._document(example),)
        if not self._checked:
            self._check_template()
        self.chat.clock_of_row.start(len(example.messages))
        given = self.chat.conversation(example)
        merged = len(example.messages) - len(given.messages)
        try:
            renderings = self._conversation(given)
        except RowError as error:
            raise _as_given(error, merged) from error
        for rendering in renderings:
            self._encoder.alphabet.check(rendering.text)
        return tuple(_renumbered(rendering, merged) for rendering in renderings) if merged else renderings

    def tokenise(self, renderings: Sequence[Rendering]) -> list[TokenizedText | RowError]:
        """Ids and labels of each, or why not; one call of the Rust tokenizer, which lets other threads run."""
        parts = [self._parts(rendering) for rendering in renderings]
        ids = iter(self._encoder.ids([part for texts in parts for part in texts]))
        rows = [list(islice(ids, len(texts))) for texts in parts]
        whole = [place for place, texts in enumerate(parts) if len(texts) == 1]
        borders = self._encoder.prompt_borders(
            [renderings[place].text for place in whole],
            [rows[place][0] for place in whole],
            [[answer.start for answer in renderings[place].answers] for place in whole],
        )
        border_of: dict[int, Sequence[int | None]] = dict(zip(whole, borders, strict=True))
        return [
            self._labelled(rendering, row[0], border_of[place])
            if place in border_of
            else self._labelled(rendering, np.concatenate(row), [len(row[0])])
            for place, (rendering, row) in enumerate(zip(renderings, rows, strict=True))
        ]

    def _parts(self, rendering: Rendering) -> tuple[str, ...]:
        """The texts that are tokenised: one, or the prompt and what the model writes, each by itself.

        Tokenizers that put a space before every text cannot be asked for the second part alone.
        """
        if len(rendering.answers) == 1 and rendering.answers[0].alone and not self._encoder.adds_space:
            start = rendering.answers[0].start
            return rendering.text[:start], rendering.text[start:]
        return (rendering.text,)

    @cached_property
    def chat(self) -> ChatTemplate:
        """The chat template."""
        return ChatTemplate(self._tokenizer, self._name, self._system)

    def _check_template(self) -> None:
        """Refuse a template that cannot work for any row, once and by its name; learn how its prompts end."""
        chat, self._checked = self.chat, True
        question, answer = PROBE_TURNS
        problems = problems_of_template(chat)
        if not problems:
            problems = list(map(template_problem, self._probe_problems(Conversation([question, answer]))))
        if problems:
            raise DataError(problems)
        self._encoder.learn(chat.text([question], generation=True), PROBE)
        result = Message(role="tool", content="probe-7351", tool_call_id="abcdefghi", name="probe")
        calls: list[Any] = [{"type": "function", "id": "abcdefghi", "function": {"name": "probe", "arguments": {}}}]
        called = Message(role="assistant", content="", tool_calls=calls)
        try:
            self._encoder.learn(chat.text([question, called, result], generation=True), "probe-7351")
        except RowError:
            return  # no tools, then

    def _probe_problems(self, probe: Conversation) -> list[RowError]:
        """What is wrong with the probe as tokens.

        Where a token straddles the end of the prompt (GPT-2's tokenizer reads two line breaks as one token, but not
        before a word), prompt and answer are tokenised one by one, as generation does it, and each answer has a text
        of its own.
        """
        problems: list[RowError] = []
        for alone in (False, True):
            self.chat.prompt_alone = alone
            try:
                rendered = self.tokenise(self._conversation(probe))[0]
            except RowError as error:
                return [error]
            problems = [rendered] if isinstance(rendered, RowError) else []
            if not problems:
                break
        return problems

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

    def _conversation(self, given: Conversation) -> tuple[Rendering, ...]:
        examples = find_examples(self.chat, given, self._loss_on)
        if self._loss_on != "all":
            return tuple(Rendering(text, answers) for text, answers in examples)
        [(text, answers)] = examples
        return (Rendering(text, answers, everything=True, holes=find_holes(self.chat, given, text)),)

    def _labelled(self, rendering: Rendering, ids: Ints, borders: Sequence[int | None]) -> TokenizedText | RowError:
        if rendering.document:
            ids = np.array([*self._bos, *ids.tolist(), self._eos_id], dtype=np.int32)
        labels = ids.copy() if rendering.everything else np.full(len(ids), IGNORED, dtype=np.int32)
        # Where everything is learned, it decides nothing where prompts end.
        ends: dict[int, Any] = {}  # the places of each token that ends answers
        answers = () if rendering.everything else zip(rendering.answers, borders, strict=True)
        for answer, start in answers:
            if start == TOO_MANY:
                what = f"{len(rendering.answers):,} answers, each of whose prompts must be tokenised, are too many"
                return RowError("messages", what, "split the conversation", f"{len(rendering.text):,} characters")
            if start is None:
                return self._straddled(rendering, ids, answer)
            # Contents cannot contain special tokens, so the next one is the answer's own end.
            end_id = self._id_of(answer.end_token)
            if end_id not in ends:
                ends[end_id] = np.flatnonzero(ids == end_id)
            following = int(np.searchsorted(ends[end_id], start))
            if following == len(ends[end_id]):
                what = f"the tokenizer does not read {answer.end_token} as one token"
                return RowError(f"messages[{answer.message}]", what, "fix its tokenizer.json")
            end = int(ends[end_id][following]) + 1
            labels[start:end] = ids[start:end]
        holes = list(rendering.holes)
        if not self._train_on_reasoning:
            holes += [answer.reasoning for answer in rendering.answers if answer.reasoning]
        self._ignore(rendering, holes, labels)
        if rendering.everything:
            labels[:1] = IGNORED
        return TokenizedText(ids, labels, borders[0] if borders else None)

    def _id_of(self, token: str) -> int:
        if token not in self._ids:
            self._ids[token] = int(self._tokenizer.convert_tokens_to_ids(token))
        return self._ids[token]

    def _ignore(self, rendering: Rendering, holes: Sequence[tuple[int, int]], labels: Ints) -> None:
        """Take the tokens of these characters out of the loss."""
        if not holes:
            return
        spans: list[tuple[int, int]] = []
        shift = 0
        for part in self._parts(rendering):
            spans += [(start + shift, end + shift) for start, end in self._encoder.spans(part)]
            shift += len(part)
        places = np.array(spans, dtype=np.int64).reshape(-1, 2)
        for start, end in holes:
            labels[(places[:, 0] < end) & (places[:, 1] > start)] = IGNORED

    def _straddled(self, rendering: Rendering, ids: Ints, answer: Answer) -> RowError:
        what = "a token straddles the border between prompt and answer, so generation would begin differently"
        do = "remove the white space at the answer's beginning, or name another one in data.chat_template"
        prompt = self._encoder.ids([rendering.text[: answer.start]])[0]
        differ = next((i for i, token in enumerate(prompt) if i >= len(ids) or ids[i] != token), len(prompt))
        got = self._tokenizer.decode(ids[differ : differ + 1])
        return RowError(f"messages[{answer.message}].content", what, do, shown(got))


def _renumbered(rendering: Rendering, merged: int) -> Rendering:
    """With the row's own message numbers, after `merged` messages were put into another one."""
    answers = tuple(answer._replace(message=answer.message + merged) for answer in rendering.answers)
    return replace(rendering, answers=answers)


def _as_given(error: RowError, merged: int) -> RowError:
    """The error with the row's own message numbers, after `merged` messages were put into another one."""
    if merged and error.field and error.field.startswith("messages["):
        number, _, rest = error.field.removeprefix("messages[").partition("]")
        error.field = f"messages[{int(number) + merged}]{rest}"
    return error
