"""Rows that are too long: cut, split, dropped or refused, and never kept without anything to learn."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.render import IGNORED
from finetune.data.row_errors import RowError
from finetune.data.tokens.truncation import TooLongError, fit
from finetune.data.types import TokenizedText
from finetune.recipe import DataSettings, DataSource


def settings(limit: int, overlong: Any) -> DataSettings:
    source = DataSource(path="rows.jsonl", format="text")
    return DataSettings(train=source, max_length=limit, overlong=overlong)


def pieces(labels: list[int], limit: int, overlong: Any) -> list[TokenizedText]:
    """A row whose token ids count from 1; a label of 0 is one without loss."""
    ids = np.arange(1, len(labels) + 1, dtype=np.int32)
    marked = np.where(np.array(labels) > 0, ids, IGNORED).astype(np.int32)
    return fit(TokenizedText(ids, marked), settings(limit, overlong))


@pytest.mark.parametrize("overlong", ["error", "truncate", "drop", "split"])
def test_a_row_that_fits_is_kept_whole(overlong: str) -> None:
    [piece] = pieces([0, 1, 1], 3, overlong)
    assert (piece.input_ids.tolist(), piece.labels.tolist(), piece.supervised) == ([1, 2, 3], [IGNORED, 2, 3], 2)


def test_truncate_keeps_the_beginning() -> None:
    [piece] = pieces([0, 1, 1, 1], 3, "truncate")
    assert (piece.input_ids.tolist(), piece.labels.tolist()) == ([1, 2, 3], [IGNORED, 2, 3])


def test_drop_keeps_nothing() -> None:
    assert pieces([0, 1, 1, 1], 3, "drop") == []


def test_error_is_of_a_kind_that_no_setting_drops() -> None:
    with pytest.raises(TooLongError, match=r"longer than data\.max_length = 3 tokens"):
        pieces([0, 1, 1, 1], 3, "error")


@pytest.mark.parametrize("overlong", ["truncate", "split"])
def test_a_cut_that_leaves_nothing_supervised_is_refused(overlong: str) -> None:
    # With `split` the only supervised token begins the second piece, where nothing predicts it.
    with pytest.raises(RowError, match=r"cut at data\.max_length = 3 tokens it has no supervised token left"):
        pieces([0, 0, 0, 1], 3, overlong)


def test_split_leaves_out_pieces_without_anything_to_learn() -> None:
    kept = pieces([0, 0, 0, 0, 1, 1, 0], 3, "split")
    assert [piece.input_ids.tolist() for piece in kept] == [[4, 5, 6]]


@given(st.lists(st.integers(0, 1), min_size=1, max_size=60), st.integers(2, 20))
def test_split_keeps_every_supervised_token_but_those_that_begin_a_piece(labels: list[int], limit: int) -> None:
    wanted = {i + 1 for i, label in enumerate(labels) if label and (i % limit or i == 0)}
    try:
        kept = pieces(labels, limit, "split")
    except RowError:
        assert not wanted
        return
    assert all(len(piece.input_ids) <= limit for piece in kept)
    if len(labels) > limit:
        assert all(piece.supervised for piece in kept)
    found = [label for piece in kept for label in piece.labels.tolist() if label != IGNORED]
    assert found == sorted(wanted)
