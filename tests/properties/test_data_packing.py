"""Packing, for any lengths: nothing lost, nothing doubled, no sequence too long, and no room left for two in one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.tokens.packing import best_fit_decreasing, count_sequences

CAPACITY = 64
lengths_strategy = st.lists(st.integers(1, CAPACITY), max_size=200)


@given(lengths_strategy)
def test_every_row_stands_in_exactly_one_sequence(lengths: list[int]) -> None:
    bins = best_fit_decreasing(lengths, CAPACITY)
    assert sorted(index for each in bins for index in each) == list(range(len(lengths)))


@given(lengths_strategy)
def test_no_sequence_is_longer_than_the_limit(lengths: list[int]) -> None:
    bins = best_fit_decreasing(lengths, CAPACITY)
    assert all(sum(lengths[i] for i in each) <= CAPACITY for each in bins)


@given(lengths_strategy)
def test_no_two_sequences_would_fit_into_one(lengths: list[int]) -> None:
    sizes = sorted(sum(lengths[i] for i in each) for each in best_fit_decreasing(lengths, CAPACITY))
    assert len(sizes) < 2 or sizes[0] + sizes[1] > CAPACITY


@given(lengths_strategy)
def test_rows_of_one_length_go_together_and_yet_to_where_each_by_itself_would_have_gone(lengths: list[int]) -> None:
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [each for each in range(len(bins)) if room[each] >= lengths[index]]
        chosen = min(fitting, key=lambda each: room[each], default=None)
        if chosen is None:
            chosen = len(bins)
            bins.append([])
            room.append(CAPACITY)
        bins[chosen].append(index)
        room[chosen] -= lengths[index]
    packed = list(best_fit_decreasing(lengths, CAPACITY))
    assert sorted(sum(lengths[i] for i in each) for each in packed) == sorted(CAPACITY - each for each in room)


def test_no_rows_make_no_sequences_and_a_row_without_tokens_is_an_error() -> None:
    assert len(best_fit_decreasing([], CAPACITY)) == 0
    with pytest.raises(ValueError, match="row 1 has 0 tokens, so there is no row"):
        best_fit_decreasing([3, 0], CAPACITY)


def test_a_row_longer_than_a_sequence_is_an_error() -> None:
    with pytest.raises(ValueError, match="row 1 has 65 tokens, more than a sequence of 64"):
        best_fit_decreasing([3, 65], CAPACITY)


def test_a_large_mixed_set_wastes_almost_nothing() -> None:
    lengths = [(i * 7919) % 1000 + 24 for i in range(5000)]
    waste = 1 - sum(lengths) / (4096 * len(best_fit_decreasing(lengths, 4096)))
    assert waste < 0.002


@given(lengths_strategy)
def test_sequences_are_counted_as_they_would_be_made(lengths: list[int]) -> None:
    assert count_sequences(np.array(lengths, dtype=np.int32), CAPACITY) == len(best_fit_decreasing(lengths, CAPACITY))
