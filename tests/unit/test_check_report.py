"""Figures of `finetune check` that follow from lengths: against counting it out."""

from collections import Counter
from itertools import combinations
from statistics import mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.check.check_report import MAX_BINS, Bin, histogram, padding_share


@given(st.dictionaries(st.integers(1, 5000), st.integers(1, 50), min_size=1), st.integers(2, 6000))
def test_every_row_is_in_one_bin_and_no_bin_lies_on_both_sides_of_the_limit(
    lengths: dict[int, int], limit: int
) -> None:
    bins = histogram(lengths, limit)
    assert len(bins) <= MAX_BINS + 1
    for bin_ in bins:
        assert bin_.rows == sum(rows for length, rows in lengths.items() if bin_.first <= length <= bin_.last)
        assert bin_.last <= limit or bin_.first > limit
    assert [bin_.first for bin_ in bins[1:]] == [bin_.last + 1 for bin_ in bins[:-1]]
    assert sum(bin_.rows for bin_ in bins) == sum(lengths.values())
    assert bins[0].rows
    assert bins[-1].rows


def test_bins_are_equal_and_end_at_powers_of_two() -> None:
    counts = [(25, 28, 3), (29, 32, 0), (33, 36, 0), (37, 40, 4), (41, 44, 1)]
    assert histogram({25: 3, 37: 4, 44: 1}, 256) == [Bin(*count) for count in counts]


def test_a_few_long_rows_do_not_hide_how_long_most_are() -> None:
    short = Counter(dict.fromkeys(range(20, 60), 100))
    bins = histogram(short | {30_000: 1}, 4096)
    assert [bin_ for bin_ in bins if bin_.last <= 64] == [Bin(17, 32, 1300), Bin(33, 64, 2700)]
    assert bins[-1] == Bin(16_385, 32_768, 1)


def test_no_rows_have_no_bins() -> None:
    assert histogram({}, 256) == []


@pytest.mark.parametrize("batch", [1, 2, 3, 6, 9])
def test_the_expected_padding_is_the_mean_over_all_batches(batch: int) -> None:
    lengths = [3, 5, 5, 8, 20, 40]
    batches = list(combinations(lengths, min(batch, len(lengths))))
    pads = mean(sum(max(each) - length for length in each) for each in batches)
    tokens = mean(max(each) * len(each) for each in batches)
    sizes = np.array(lengths, dtype=np.int32)
    assert padding_share(sizes, sizes, batch) == pytest.approx(pads / tokens)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_the_expected_padding_of_pairs_is_the_mean_over_all_batches_of_both_their_rows(batch: int) -> None:
    pairs = [(3, 9), (5, 5), (8, 2), (20, 1)]
    batches = [[row for pair in drawn for row in pair] for drawn in combinations(pairs, batch)]
    pads = mean(sum(max(rows) - row for row in rows) for rows in batches)
    tokens = mean(max(rows) * len(rows) for rows in batches)
    both, longer = (np.array([each(pair) for pair in pairs], dtype=np.int32) for each in (sum, max))
    assert padding_share(both, longer, batch, rows=2) == pytest.approx(pads / tokens)
