"""What follows from the lengths of the rows: a histogram, what packing leaves unfilled, what padding adds."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

MAX_BINS = 16


@dataclass(frozen=True)
class Bin:
    """`rows` rows of `first` to `last` tokens."""

    first: int
    last: int
    rows: int


def histogram(lengths: Mapping[int, int], limit: int) -> list[Bin]:
    """Rows by length (length -> rows), from the shortest to the longest; no bin lies on both sides of `limit`.

    Equal bins, at most `MAX_BINS`. Where these would put more than two thirds of the rows into one of them, each bin is
    twice as wide as the one before it: then few long rows do not hide how long most are.
    """
    if not lengths:
        return []
    longest = max(lengths)
    # Powers of two: round numbers to whoever counts tokens, and `limit` nearly always is one.
    width = 2 ** max(0, math.ceil(math.log2(longest / MAX_BINS)))
    equal = _counted(lengths, range(0, longest + width, width), limit)
    if width == 1 or max(each.rows for each in equal) <= 2 / 3 * sum(lengths.values()):
        return equal
    return _counted(lengths, [0, *(2**power for power in range((longest - 1).bit_length() + 1))], limit)


def _counted(lengths: Mapping[int, int], ends: Iterable[int], limit: int) -> list[Bin]:
    """Bins that end at `ends`, each without its beginning, from the first to the last with a row."""
    edges = sorted(ends)
    if limit < edges[-1]:
        edges = sorted({*edges, limit})
    sizes = np.array(sorted(lengths))
    before = np.concatenate([[0], np.cumsum([lengths[int(size)] for size in sizes])])
    rows = np.diff(before[np.searchsorted(sizes, edges, side="right")])
    bins = [Bin(first + 1, last, int(n)) for first, last, n in zip(edges, edges[1:], rows, strict=False)]
    occupied = [index for index, each in enumerate(bins) if each.rows]
    return bins[occupied[0] : occupied[-1] + 1]


def padding_share(tokens: npt.NDArray[np.int32], longest: npt.NDArray[np.int32], batch: int, rows: int = 1) -> float:
    """The share of pads that is expected where items, drawn at random `batch` at a time, are padded to their longest.

    Each item is `rows` rows of the batch with `tokens` in all, the longest of them of `longest`. Exact for full
    batches: the expected longest of a draw without replacement, from P(all `batch` items <= n).
    """
    sizes, counts = np.unique(longest, return_counts=True)
    batch = min(batch, len(longest))
    shorter = np.cumsum(counts).astype(np.float64)
    at_most: Floats = np.ones(len(sizes))
    for drawn in range(batch):
        at_most *= np.clip(shorter - drawn, 0, None) / (len(longest) - drawn)
    expected_longest = float(sizes @ np.diff(at_most, prepend=0.0))
    return 1 - float(tokens.mean()) / (rows * expected_longest)
