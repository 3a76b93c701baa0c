"""Rows and pairs longer than `data.max_length`: truncated, split, dropped or an error."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.render import Rendered
from finetune.data.row_errors import RowError
from finetune.data.types import IGNORED, Ints
from finetune.recipe import DataSettings


class TooLongError(RowError):
    """A row that is too long where the recipe says `overlong: error`. It is no bad row that could be dropped."""


@dataclass(frozen=True)
class Piece:
    """A row, or a part of it, as it is kept: token ids and labels of the same length (`IGNORED`: no loss)."""

    input_ids: Ints
    labels: Ints

    @property
    def columns(self) -> tuple[Ints, Ints]:
        """As they are written."""
        return self.input_ids, self.labels

    @property
    def tokens(self) -> int:
        """Its length."""
        return len(self.input_ids)

    @property
    def supervised(self) -> int:
        """Tokens that carry a loss."""
        return int(np.count_nonzero(self.labels != IGNORED))


def too_long(field: str | None, tokens: int, limit: int, policies: str) -> TooLongError:
    """The error of a row that the settings refuse for its length."""
    do = f"raise data.max_length, shorten the row, or set data.overlong to {policies}"
    return TooLongError(field, f"longer than data.max_length = {limit} tokens", do, f"{tokens} tokens")


def fit(input_ids: Ints, labels: Ints, settings: DataSettings) -> list[Piece]:
    """The row as what is kept of it: itself, cut, in pieces, or nothing (dropped).

    Raises `TooLongError` where the settings refuse its length, and `RowError` for a cut that leaves nothing supervised.
    """
    limit = settings.max_length
    if len(input_ids) <= limit:
        return [Piece(input_ids, labels)]
    if settings.overlong == "drop":
        return []
    if settings.overlong == "error":
        raise too_long(None, len(input_ids), limit, "truncate, split or drop")
    pieces = [Piece(input_ids[:limit], labels[:limit])]
    if settings.overlong == "split":
        pieces += _rest(input_ids, labels, limit)
    kept = [piece for piece in pieces if piece.supervised]
    if not kept:
        what = f"cut at data.max_length = {limit} tokens it has no supervised token left"
        do = "raise data.max_length, or set data.overlong to drop"
        raise RowError(None, what, do, f"{len(input_ids)} tokens")
    return kept


def _rest(input_ids: Ints, labels: Ints, limit: int) -> Sequence[Piece]:
    """What follows the first `limit` tokens. Nothing of its own piece predicts a piece's first token: no loss there."""
    pieces = []
    for start in range(limit, len(input_ids), limit):
        part = labels[start : start + limit].copy()
        part[0] = IGNORED
        pieces.append(Piece(input_ids[start : start + limit], part))
    return pieces


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
