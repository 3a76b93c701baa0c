"""Figures of the row lengths: a histogram, and the expected share of padding."""

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
    """Rows by length (`lengths`: length -> rows), from the shortest to the longest; no bin crosses `limit`.

    Bins of equal width, at most `MAX_BINS`. If one of them had more than two thirds of the rows, each bin is twice as
    wide as the one before it instead: a few long rows then do not hide the lengths of most.
    """
    if not lengths:
        return []
    longest = max(lengths)
    # Powers of two, as `limit` nearly always is.
    width = 2 ** max(0, math.ceil(math.log2(longest / MAX_BINS)))
    equal = _counted(lengths, range(0, longest + width, width), limit)
    if width == 1 or max(bin_.rows for bin_ in equal) <= 2 / 3 * sum(lengths.values()):
        return equal
    return _counted(lengths, [0, *(2**power for power in range((longest - 1).bit_length() + 1))], limit)


def _counted(lengths: Mapping[int, int], ends: Iterable[int], limit: int) -> list[Bin]:
    """Bins (start, end] with their ends at `ends`, from the first to the last that has rows."""
    edges = sorted(ends)
    if limit < edges[-1]:
        edges = sorted({*edges, limit})
    sizes = np.array(sorted(lengths))
    before = np.concatenate([[0], np.cumsum([lengths[int(size)] for size in sizes])])
    rows = np.diff(before[np.searchsorted(sizes, edges, side="right")])
    bins = [Bin(first + 1, last, int(n)) for first, last, n in zip(edges, edges[1:], rows, strict=False)]
    occupied = [index for index, bin_ in enumerate(bins) if bin_.rows]
    return bins[occupied[0] : occupied[-1] + 1]


def padding_share(tokens: npt.NDArray[np.int32], longest: npt.NDArray[np.int32], batch: int, rows: int = 1) -> float:
    """Expected share of padding tokens if `batch` random items at a time are padded to the longest.

    Each item is `rows` rows of the batch with `tokens` in total, the longest of them of `longest` tokens. Exact for
    full batches: the expected maximum of a draw without replacement, from P(all `batch` items <= n).
    """
    sizes, counts = np.unique(longest, return_counts=True)
    batch = min(batch, len(longest))
    shorter = np.cumsum(counts).astype(np.float64)
    at_most: Floats = np.ones(len(sizes))
    for drawn in range(batch):
        at_most *= np.clip(shorter - drawn, 0, None) / (len(longest) - drawn)
    expected_longest = float(sizes @ np.diff(at_most, prepend=0.0))
    return 1 - float(tokens.mean()) / (rows * expected_longest)
