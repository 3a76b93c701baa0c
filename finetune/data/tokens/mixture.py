"""Which rows of several sets make one epoch: the weights are proportions of rows, held to less than one row."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
StoppingStrategy = Literal["first_exhausted", "all_exhausted"]


def mix(sizes: Sequence[int], weights: Sequence[float] | None, strategy: StoppingStrategy, seed: int) -> list[Indices]:
    """For each set the rows that are used, by their index; a set that is repeated has some indices twice or more.

    Without weights every row once. With them set i gives `weights[i] / sum(weights)` of all rows. `first_exhausted`: as
    many as there can be without using a row twice; `all_exhausted`: as few as there must be for every row to be used.
    What is left out or used once more is drawn with `seed`; nothing depends on anything else.
    """
    if weights is None:
        return [np.arange(size, dtype=np.int64) for size in sizes]
    return [
        _take(size, count, np.random.default_rng([seed, index]))
        for index, (size, count) in enumerate(zip(sizes, quotas(sizes, weights, strategy), strict=True))
    ]


def quotas(sizes: Sequence[int], weights: Sequence[float], strategy: StoppingStrategy) -> list[int]:
    """Rows of each set. The set that decides the length of the epoch is used whole; the others are rounded."""
    rows_by_weight = [size / weight for size, weight in zip(sizes, weights, strict=True)]
    scale = min(rows_by_weight) if strategy == "first_exhausted" else max(rows_by_weight)
    return [round(weight * scale) for weight in weights]


def _take(size: int, count: int, random: np.random.Generator) -> Indices:
    whole, rest = divmod(count, size)
    drawn = np.sort(random.permutation(size)[:rest])
    return np.concatenate([np.tile(np.arange(size, dtype=np.int64), whole), drawn.astype(np.int64)])
