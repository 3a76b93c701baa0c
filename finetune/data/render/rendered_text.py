"""Text that already has its marks (`<s>[INST] ... [/INST] ... </s>`) -> ids and labels, without a chat template.

The marks are read as tokens. BOS and EOS are added as for any document, but only where the text does not have them.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from finetune.data.render.control_tokens import control_tokens
from finetune.data.render.encoder import Encoder, own_bos
from finetune.data.row_errors import RowError, shown
from finetune.data.types import IGNORED, Answer, Conversation, Document, Ints, Rendering, TokenizedText
from finetune.recipe.settings import LossOn

# Tokens as chat formats write them; a vocabulary that lacks one would split it into pieces.
_TOKEN = re.compile("<\\|[^<>|\\s]+\\|>|<\uff5c[^<>\uff5c\\s]+\uff5c>|<(?:start|end)_of_\\w+>|^\\s*<s>|</s>\\s*$")


class Marks(NamedTuple):
    """What comes before each answer in a text, and what ends it (null: the EOS)."""

    response_template: str | None
    response_end: str | None


class RenderedText:
    """Reads rows of `format: rendered` for one fast tokenizer; the interface of `Renderer`.

    `loss_on`: the text after each `response_template` through its end mark (`assistant`), after the last one only
    (`last_assistant`), or `all` tokens but a row's first.
    """

    def __init__(self, tokenizer: Any, loss_on: LossOn, marks: Marks) -> None:
        self._encoder = Encoder(tokenizer, control_tokens(tokenizer))
        self._known = tokenizer.get_vocab()
        self._bos, self._eos = tokenizer.bos_token, str(tokenizer.eos_token)
        self._bos_ids, self._eos_id = own_bos(tokenizer), int(tokenizer.eos_token_id)
        self._loss_on = loss_on
        self._before = marks.response_template
        self._end = marks.response_end or self._eos

    def render(self, example: Conversation | Document) -> Rendering:
        """One row with the places of its answers; `RowError` where its marks are not whole."""
        assert isinstance(example, Document)
        text = example.text
        if self._bos and text.lstrip().startswith(self._bos):
            text = text.lstrip()
        self._check(text)
        self._encoder.alphabet.check(text)
        if self._loss_on == "all":
            return Rendering(text, everything=True, document=True)
        answers = self._answers(text)
        return Rendering(text, tuple(answers[-1:] if self._loss_on == "last_assistant" else answers), document=True)

    def examples(self, example: Conversation | Document) -> tuple[Rendering, ...]:
        """The same, as the one text that it is."""
        return (self.render(example),)

    def tokenise(self, renderings: Sequence[Rendering]) -> list[TokenizedText | RowError]:
        """Ids and labels of each, or why not."""
        texts = [rendering.text for rendering in renderings]
        rows = self._encoder.ids(texts)
        starts = [[answer.start for answer in rendering.answers] for rendering in renderings]
        borders = self._encoder.prompt_borders(texts, rows, starts)
        return [self._labelled(*row) for row in zip(renderings, rows, borders, strict=True)]

    def _check(self, text: str) -> None:
        split = next((mark for found in _TOKEN.findall(text) if (mark := found.strip()) not in self._known), None)
        if split is not None:
            what = f"holds {split}, which this vocabulary lacks and would split into pieces"
            do = "use the marks of this tokenizer, or add the token to model.added_tokens"
            raise RowError("text", what, do, shown(text))
        begins = bool(self._bos) and re.match(rf"(?:{re.escape(self._bos)}\s*){{2}}", text)
        ends = self._eos != self._bos and re.search(rf"{re.escape(self._eos)}\s*{re.escape(self._eos)}\s*$", text)
        if begins or ends:
            token = self._bos if begins else self._eos
            raise RowError("text", f"has {token} twice in a row", "keep one of the two", shown(text))

    def _answers(self, text: str) -> list[Answer]:
        """The characters of each answer, from its mark's end through its end mark."""
        assert self._before is not None
        answers: list[Answer] = []
        after = text.find(self._before)
        if after < 0:
            do = "remove the row, or correct response_template of its data set"
            raise RowError("text", f"does not hold the response_template {shown(self._before)}", do, shown(text))
        while after >= 0:
            start = after + len(self._before)
            end, after = text.find(self._end, start), text.find(self._before, start)
            if end < 0 and after < 0 and self._end == self._eos:
                end, stop = len(text), len(text)  # the EOS is added
            else:
                stop = end + len(self._end)
            if end < 0 or 0 <= after < end:
                do = "write it at the end of every answer, or name the true one in response_end of the data set"
                raise RowError("text", f"has an answer without {shown(self._end)} at its end", do, shown(text[start:]))
            if not text[start:end].strip():
                raise RowError("text", "has an empty answer", "fill it in or remove the row", shown(text))
            answers.append(Answer(len(answers), start, stop))
        return answers

    def _labelled(self, rendering: Rendering, ids: Ints, borders: Sequence[int | None]) -> TokenizedText | RowError:
        labels = ids.copy() if rendering.everything else np.full(len(ids), IGNORED, dtype=np.int32)
        spans = np.array(self._encoder.spans(rendering.text) if rendering.answers else [], dtype=np.int64)
        for answer, border in zip(rendering.answers, borders, strict=True):
            inside = [((spans[:, 0] < place) & (spans[:, 1] > place)).any() for place in (answer.start, answer.end)]
            if border is None or any(inside):
                return self._straddled(at_end=bool(inside[1]))
            here = np.arange(len(ids)) >= border
            here &= spans[:, 0] < answer.end
            labels[here] = ids[here]
        return self._framed(rendering, ids, labels)

    def _framed(self, rendering: Rendering, ids: Ints, labels: Ints) -> TokenizedText:
        """With the BOS and EOS that the text itself does not have."""
        text = rendering.text
        first = [] if self._bos and text.startswith(self._bos) else self._bos_ids
        last = [] if text.rstrip().endswith(self._eos) else [self._eos_id]
        learned = rendering.everything or (rendering.answers and rendering.answers[-1].end == len(text))
        ids = np.array([*first, *ids.tolist(), *last], dtype=np.int32)
        last_labels = last if learned else [IGNORED] * len(last)
        labels = np.array([*[IGNORED] * len(first), *labels.tolist(), *last_labels], dtype=np.int32)
        labels[:1] = IGNORED
        return TokenizedText(ids, labels)

    def _straddled(self, at_end: bool) -> RowError:
        name, mark = ("response_end", self._end) if at_end else ("response_template", self._before)
        what = f"a token straddles the end of {name} {shown(mark)}, so generation would begin or stop differently"
        do = "begin and end the mark where a token does: without white space that belongs to the answer"
        return RowError("text", what, do)
