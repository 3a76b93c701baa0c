"""Two rendered conversations -> the pair: where the prompt ends, that the answers differ, and what of them is kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.render import IGNORED, Rendered
from finetune.data.rows import RowError
from finetune.data.tokens.lengths import too_long
from finetune.data.types import Ints
from finetune.recipe import DataSettings

ANSWERS = ("chosen", "rejected")


@dataclass(frozen=True)
class PairPiece:
    """A pair as it is kept: the tokens of the prompt, then ids and labels of each answer (see `TokenPair`)."""

    prompt_ids: Ints
    chosen_ids: Ints
    chosen_labels: Ints
    rejected_ids: Ints
    rejected_labels: Ints

    @property
    def columns(self) -> tuple[Ints, ...]:
        """As they are written."""
        return self.prompt_ids, self.chosen_ids, self.chosen_labels, self.rejected_ids, self.rejected_labels

    @property
    def tokens(self) -> int:
        """Of both conversations, each with the prompt."""
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)

    @property
    def supervised(self) -> int:
        """Tokens that carry a loss, of both answers."""
        return sum(int(np.count_nonzero(labels != IGNORED)) for labels in (self.chosen_labels, self.rejected_labels))


def fit_pair(chosen: Rendered, rejected: Rendered, settings: DataSettings) -> list[PairPiece]:
    """The pair as what is kept of it: itself, its answers cut, or nothing (dropped).

    Each conversation, the prompt with one answer, may have `max_length` tokens. Raises `TooLongError` where the
    settings refuse their length, and `RowError` at `chosen` or `rejected` for a pair that says nothing.
    """
    limit = settings.max_length
    prompt = _prompt(chosen, rejected)
    if np.array_equal(chosen.input_ids, rejected.input_ids):
        what = "the same answer as the chosen one: once both are rendered they have the same tokens"
        raise RowError("rejected", what, "remove the row: it says nothing about what is better")
    sides = [chosen, rejected]
    for name, side in zip(ANSWERS, sides, strict=True):
        if len(side.input_ids) > limit and settings.overlong == "error":
            raise too_long(name, len(side.input_ids), limit, "truncate or drop")
    if any(len(side.input_ids) > limit for side in sides):
        if settings.overlong == "drop":
            return []
        sides = _cut(sides, len(prompt), limit)
    start = len(prompt)
    answers = [tokens[start:] for side in sides for tokens in (side.input_ids, side.labels)]
    return [PairPiece(prompt, *answers)]


def _prompt(chosen: Rendered, rejected: Rendered) -> Ints:
    """What stands before the first supervised token of each answer, and must be the same for both."""
    prompt, other = (side.input_ids[: int(np.argmax(side.labels != IGNORED))] for side in (chosen, rejected))
    if not np.array_equal(prompt, other):
        what = "the template renders another prompt before this answer than before the chosen one"
        raise RowError("rejected", what, "name another one in data.chat_template")
    return prompt


def _cut(sides: Sequence[Rendered], prompt: int, limit: int) -> list[Rendered]:
    """Both conversations with at most `limit` tokens; `RowError` if they compare nothing any more."""
    do = "raise data.max_length, or set data.overlong to drop"
    if prompt >= limit:  # an answer's first token is supervised
        what = f"cut at data.max_length = {limit} tokens neither answer has a supervised token left"
        raise RowError("prompt", what, do, f"a prompt of {prompt} tokens")
    chosen, rejected = (Rendered(side.input_ids[:limit], side.labels[:limit]) for side in sides)
    if np.array_equal(chosen.input_ids, rejected.input_ids):
        what = f"cut at data.max_length = {limit} tokens both answers are the same"
        raise RowError("rejected", what, do, " and ".join(f"{len(side.input_ids)} tokens" for side in sides))
    return [chosen, rejected]
