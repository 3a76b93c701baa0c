"""What packing leaves empty: ours over the whole data set, TRL's as its trainer calls it, on the same lengths."""

import math
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from trl import pack_dataset

from benchmarks.harness import Bar
from finetune.data.tokens.packing import best_fit_decreasing

CAPACITY = 4096
MEANS = (490, 899, 1762)
# Standard deviation of the logarithm of a row's length. Instruction sets: Alpaca 1.0, a set of pairs of answers 1.0, a
# set of tool calls 1.1. 0.8 is harder to win at: fewer short rows to fill with. 0.6 is reported without a bar.
SIGMAS = (0.8, 1.0)
NARROW = 0.6
ROWS = 20_000
LIMIT = 0.4

Lengths = npt.NDArray[np.int64]


def draw_lengths(mean: float, sigma: float, rows: int, seed: int = 0, capacity: int = CAPACITY) -> Lengths:
    """Lognormal lengths in tokens, those above `capacity` cut down to it; their expectation after the cut is `mean`."""
    low, high = 0.0, math.log(capacity) + 3
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _mean_of_cut(middle, sigma, capacity) < mean else (low, middle)
    drawn = np.random.default_rng(seed).lognormal(low, sigma, rows)
    return np.clip(np.rint(drawn), 1, capacity).astype(np.int64)


def _mean_of_cut(mu: float, sigma: float, capacity: float) -> float:
    """Expectation of min(x, capacity) for x lognormal."""
    edge = (math.log(capacity) - mu) / sigma
    return math.exp(mu + sigma**2 / 2) * _normal(edge - sigma) + capacity * (1 - _normal(edge))


def _normal(x: float) -> float:
    """Distribution function of the standard normal."""
    return (1 + math.erf(x / math.sqrt(2))) / 2


def our_sequences(lengths: Lengths, capacity: int = CAPACITY) -> int:
    """Sequences that our packing makes of rows of these lengths."""
    return len(best_fit_decreasing(lengths, capacity))


def trl_sequences(lengths: Lengths, capacity: int = CAPACITY) -> int:
    """The same of `trl.pack_dataset`, as its trainer calls it: best-fit decreasing in batches of 1,000 rows."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.zeros(offsets[-1], np.int32)))
    rows = datasets.Dataset(pa.table({"input_ids": ids}))
    packed = pack_dataset(rows, capacity, strategy="bfd", map_kwargs={"keep_in_memory": True})
    if sum(len(row["input_ids"]) for row in packed) != lengths.sum():
        raise SystemExit("bench: trl.pack_dataset did not keep every token; the comparison would not be fair")
    return len(packed)


def waste(lengths: Lengths, sequences: int, capacity: int = CAPACITY) -> float:
    """Share of the sequences' places that hold no token."""
    return 1 - float(lengths.sum()) / (sequences * capacity)


def measure_waste(rows: int = ROWS) -> tuple[list[Bar], list[dict[str, Any]]]:
    """Bars and raw figures at every mean and spread."""
    wastes = list(_wastes(rows))
    bars = [
        Bar(
            "waste of ours / of TRL's batches of 1,000",
            f"mean {raw['mean']}, sigma {raw['sigma']}",
            raw["waste"] / raw["trl_waste"],
            "<=",
            LIMIT if raw["sigma"] in SIGMAS else None,
            "count",
        )
        for raw in wastes
    ]
    return bars, wastes


def _wastes(rows: int) -> Iterator[dict[str, Any]]:
    for sigma in (*SIGMAS, NARROW):
        for mean in MEANS:
            lengths = draw_lengths(mean, sigma, rows)
            ours, trl = our_sequences(lengths), trl_sequences(lengths)
            yield {
                "mean": mean,
                "sigma": sigma,
                "rows": rows,
                "tokens": int(lengths.sum()),
                "rows_at_capacity": int((lengths == CAPACITY).sum()),
                "sequences": ours,
                "trl_sequences": trl,
                "least_sequences": math.ceil(lengths.sum() / CAPACITY),
                "waste": waste(lengths, ours),
                "trl_waste": waste(lengths, trl),
            }
