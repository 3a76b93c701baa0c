"""What happens to a row that is longer than `data.max_length`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.rows import RowError
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
