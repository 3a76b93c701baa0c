"""Mixtures: weights are proportions of rows, the same for the same seed, and nothing is used that should not be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.tokens.packing import StoppingStrategy, mix, quotas

STRATEGIES: tuple[StoppingStrategy, ...] = ("first_exhausted", "all_exhausted")
sets = st.lists(st.tuples(st.integers(1, 300), st.floats(0.1, 10)), min_size=1, max_size=5)


def counts(sizes: list[int], weights: list[float], strategy: StoppingStrategy, seed: int = 0) -> list[int]:
    return [len(each) for each in mix(sizes, weights, strategy, seed)]


def test_without_weights_every_row_is_used_once() -> None:
    assert [each.tolist() for each in mix([3, 2], None, "first_exhausted", 0)] == [[0, 1, 2], [0, 1]]


def test_first_exhausted_ends_where_a_set_would_be_used_twice() -> None:
    assert counts([100, 100], [3, 1], "first_exhausted") == [100, 33]
    assert counts([100, 10], [1, 1], "first_exhausted") == [10, 10]


def test_all_exhausted_repeats_the_smaller_sets_until_every_row_was_used() -> None:
    assert counts([100, 10], [1, 1], "all_exhausted") == [100, 100]
    small = mix([100, 10], [1, 1], "all_exhausted", 0)[1]
    assert np.bincount(small).tolist() == [10] * 10


def test_weights_need_not_sum_to_one() -> None:
    assert counts([100, 100], [0.3, 0.1], "first_exhausted") == counts([100, 100], [30, 10], "first_exhausted")


def test_another_seed_draws_other_rows_and_the_same_seed_the_same() -> None:
    one, again, other = (mix([100, 100], [1, 0.5], "first_exhausted", seed)[1].tolist() for seed in (1, 1, 2))
    assert one == again != other


@given(sets, st.sampled_from(STRATEGIES), st.integers(0, 2**32 - 1))
def test_the_proportions_are_those_of_the_weights_to_less_than_a_row(
    given_sets: list[tuple[int, float]], strategy: StoppingStrategy, seed: int
) -> None:
    sizes, weights = [size for size, _ in given_sets], [weight for _, weight in given_sets]
    chosen = mix(sizes, weights, strategy, seed)
    used = quotas(sizes, weights, strategy)
    assert [len(each) for each in chosen] == used
    scale = {"first_exhausted": min, "all_exhausted": max}[strategy](
        size / weight for size, weight in zip(sizes, weights, strict=True)
    )
    for count, weight in zip(used, weights, strict=True):
        assert abs(count - weight * scale) <= 0.5 + 1e-6


@given(sets, st.sampled_from(STRATEGIES), st.integers(0, 2**32 - 1))
def test_rows_are_used_equally_often_or_once_more(
    given_sets: list[tuple[int, float]], strategy: StoppingStrategy, seed: int
) -> None:
    sizes, weights = [size for size, _ in given_sets], [weight for _, weight in given_sets]
    for size, each in zip(sizes, mix(sizes, weights, strategy, seed), strict=True):
        times = np.bincount(each, minlength=size)
        assert len(times) == size
        assert times.max() - times.min() <= 1
        if strategy == "first_exhausted":
            assert times.max() <= 1
        else:
            assert times.min() >= 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_set_with_a_weight_is_used_whole(strategy: StoppingStrategy) -> None:
    assert counts([7], [0.25], strategy) == [7]
