"""Rows and pairs longer than `data.max_length`: truncated, split, dropped or an error."""

from collections.abc import Sequence

import numpy as np

from finetune.data.row_errors import RowError
from finetune.data.types import IGNORED, Ints, TokenizedText, TokenPair
from finetune.recipe import DataSettings


class TooLongError(RowError):
    """A row that is too long where the recipe says `overlong: error`. It is not a bad row that could be dropped."""


def too_long(field: str | None, tokens: int, limit: int, policies: str) -> TooLongError:
    """The error of a row whose length the settings do not allow."""
    do = f"raise data.max_length, shorten the row, or set data.overlong to {policies}"
    return TooLongError(field, f"longer than data.max_length = {limit} tokens", do, f"{tokens} tokens")


def fit(row: TokenizedText, settings: DataSettings) -> list[TokenizedText]:
    """The pieces of the row that are kept: itself, cut, several, or none (dropped).

    Raises `TooLongError` where the settings do not allow its length, and `RowError` if nothing supervised is left.
    """
    limit = settings.max_length
    input_ids, labels = row.input_ids, row.labels
    if len(input_ids) <= limit:
        return [row]
    if settings.overlong == "drop":
        return []
    if settings.overlong == "error":
        raise too_long(None, len(input_ids), limit, "truncate, split or drop")
    pieces = [TokenizedText(input_ids[:limit], labels[:limit])]
    if settings.overlong == "split":
        pieces += _rest(input_ids, labels, limit)
    kept = [piece for piece in pieces if piece.supervised]
    if not kept:
        what = f"cut at data.max_length = {limit} tokens it has no supervised token left"
        do = "raise data.max_length, or set data.overlong to drop"
        raise RowError(None, what, do, f"{len(input_ids)} tokens")
    return kept


def _rest(input_ids: Ints, labels: Ints, limit: int) -> Sequence[TokenizedText]:
    """The pieces after the first `limit` tokens. Their first tokens have no loss: nothing predicts them."""
    pieces = []
    for start in range(limit, len(input_ids), limit):
        part = labels[start : start + limit].copy()
        part[0] = IGNORED
        pieces.append(TokenizedText(input_ids[start : start + limit], part))
    return pieces


ANSWERS = ("chosen", "rejected")


def fit_pair(chosen: TokenizedText, rejected: TokenizedText, settings: DataSettings, where: str) -> list[TokenPair]:
    """The pair that is kept: itself, with its answers cut, or none (dropped).

    Each conversation, the prompt with one answer, may have `max_length` tokens. `where` is the `file:line` of the pair.
    Raises `TooLongError` where the settings do not allow their length, and `RowError` at `chosen` or `rejected` for a
    pair that compares nothing.
    """
    limit = settings.max_length
    prompt = _prompt(chosen, rejected)
    if np.array_equal(chosen.input_ids, rejected.input_ids):
        what = "the same answer as the chosen one: once both are rendered they have the same tokens"
        raise RowError("rejected", what, "remove the row: it does not say which answer is better")
    both = [chosen, rejected]
    for name, text in zip(ANSWERS, both, strict=True):
        if len(text.input_ids) > limit and settings.overlong == "error":
            raise too_long(name, len(text.input_ids), limit, "truncate or drop")
    if any(len(text.input_ids) > limit for text in both):
        if settings.overlong == "drop":
            return []
        both = _cut(both, len(prompt), limit)
    start = len(prompt)
    (chosen_ids, chosen_labels), (rejected_ids, rejected_labels) = (
        (text.input_ids[start:], text.labels[start:]) for text in both
    )
    if np.array_equal(chosen_labels[chosen_labels != IGNORED], rejected_labels[rejected_labels != IGNORED]):
        what = "the same answer as the chosen one: they differ only in what is not learned"
        learn = "" if settings.train_on_reasoning else ", or set data.train_on_reasoning to true"
        raise RowError("rejected", what, f"remove the row: it does not say which answer is better{learn}")
    return [TokenPair(prompt, chosen_ids, chosen_labels, rejected_ids, rejected_labels, where)]


def _prompt(chosen: TokenizedText, rejected: TokenizedText) -> Ints:
    """The tokens before each answer, and must be the same for both."""
    prompt, other = (
        text.input_ids[: int(np.argmax(text.labels != IGNORED)) if text.prompt is None else text.prompt]
        for text in (chosen, rejected)
    )
    if not np.array_equal(prompt, other):
        what = "the template renders another prompt before this answer than before the chosen one"
        raise RowError("rejected", what, "name another one in data.chat_template")
    return prompt


def _cut(both: Sequence[TokenizedText], prompt: int, limit: int) -> list[TokenizedText]:
    """Both conversations with at most `limit` tokens; `RowError` if they compare nothing any more."""
    do = "raise data.max_length, or set data.overlong to drop"
    empty = [name for name, text in zip(ANSWERS, both, strict=True) if not (text.labels[:limit] != IGNORED).any()]
    if empty:
        answers = "neither answer has a" if len(empty) == 2 else f"the {empty[0]} answer has no"
        what = f"cut at data.max_length = {limit} tokens {answers} supervised token left"
        raise RowError("prompt", what, do, f"a prompt of {prompt} tokens")
    chosen, rejected = (TokenizedText(text.input_ids[:limit], text.labels[:limit]) for text in both)
    if np.array_equal(chosen.input_ids, rejected.input_ids):
        what = f"cut at data.max_length = {limit} tokens both answers are the same"
        raise RowError("rejected", what, do, " and ".join(f"{len(text.input_ids)} tokens" for text in both))
    return [chosen, rejected]
