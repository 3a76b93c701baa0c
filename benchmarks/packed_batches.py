"""`python -m benchmarks.packed_batches`: packed rows under each other, beside one at a time and all in one row.

Forward and backward of a small Mixtral in float32 whose attention is a large part, on this CPU. B packed rows of L
tokens: as B micro-batches, as one micro-batch `[B, L]`, and as one row `[1, B L]`, whose attention mask has the square
of all tokens. Prints the table of bars and writes a JSON file.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.harness import REPEATS, Bar, Timings, interleaved, provenance, table, write_result
from benchmarks.memory import transient_bytes
from benchmarks.mixtral import mixtral_config, random_mixtral
from benchmarks.shapes import Shape
from finetune.data.render import IGNORED
from finetune.data.tokens.collators import Collator

RESULT = Path("benchmarks/results/packed-cpu.json")
MODEL, LAYERS, VOCABULARY = Shape(64, 128, 4, 2, 2048, 8), 2, 512
DOCUMENTS = 4  # in each row
ALONE, UNDER, ONE_ROW = "one at a time", "under each other", "in one row"
TIME_LIMIT = MEMORY_LIMIT = 1.25
"""Of B rows under each other over B times one row: their mask and time grow with B."""


def draw_rows(rows: int, tokens: int) -> list[dict[str, Any]]:
    """Packed rows of random ids, each some tokens shorter than the one before."""
    random = np.random.default_rng(0)
    drawn = []
    for number in range(rows):
        length = tokens - number
        ids = random.integers(4, VOCABULARY, length)
        cuts = np.array_split(np.arange(length), DOCUMENTS)
        positions = np.concatenate([np.arange(len(cut)) for cut in cuts])
        labels = np.where(positions == 0, IGNORED, ids)
        drawn.append({"input_ids": ids, "labels": labels, "position_ids": positions, "row": [f"random:{number}"]})
    return drawn


def packed_arms(model: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Callable[[], torch.Tensor]]:
    """The same optimizer step in three cuts: the gradient of the summed cross entropy with regard to the embedding.

    Raises AssertionError where they disagree: the race would not be fair.
    """
    tokenizer = SimpleNamespace(pad_token_id=0)
    under, one_row = (Collator(tokenizer, in_one_row) for in_one_row in (False, True))
    embedding = model.get_input_embeddings().weight.requires_grad_()

    def step(batches: Sequence[dict[str, Any]]) -> torch.Tensor:
        embedding.grad = None
        for batch in batches:
            inputs = {name: batch[name] for name in ("input_ids", "position_ids", "labels")}
            model(**inputs, use_cache=False, num_items_in_batch=1).loss.backward()
        gradient: torch.Tensor = embedding.grad
        return gradient

    arms: dict[str, Callable[[], torch.Tensor]] = {
        ALONE: partial(step, [under([row]) for row in rows]),
        UNDER: partial(step, [under(rows)]),
        ONE_ROW: partial(step, [one_row(rows)]),
    }
    wanted = arms[ALONE]().clone()
    for arm in (arms[UNDER], arms[ONE_ROW]):
        torch.testing.assert_close(arm(), wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-3)
    return arms


def measure(rows: int, tokens: int, repeats: int) -> tuple[list[Bar], dict[str, Any]]:
    """The bars, and every time and peak."""
    model = random_mixtral(mixtral_config(MODEL, LAYERS, VOCABULARY), torch.float32, "cpu", False, False)
    drawn = draw_rows(rows, tokens)
    arms = packed_arms(model, drawn)
    peaks = {name: transient_bytes(arm) for name, arm in arms.items()}
    timings = interleaved(arms, repeats)
    at = f"B{rows} L{tokens}"
    return _bars(at, rows, peaks, timings), {"at": at, "seconds": timings.seconds, "peak_bytes": peaks}


def _bars(at: str, rows: int, peaks: dict[str, int], timings: Timings) -> list[Bar]:
    return [
        Bar(f"{UNDER} / {ALONE}", at, timings.ratio(UNDER, ALONE), "<=", TIME_LIMIT, "time"),
        Bar(f"memory {UNDER} / B x {ALONE}", at, peaks[UNDER] / (rows * peaks[ALONE]), "<=", MEMORY_LIMIT, "memory"),
        Bar(f"{ONE_ROW} / {ALONE}", at, timings.ratio(ONE_ROW, ALONE), "<=", None, "time"),
        Bar(f"memory {UNDER} / {ONE_ROW}", at, peaks[UNDER] / peaks[ONE_ROW], "<=", None, "memory"),
    ]


def main() -> None:
    """The table and the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT, help="result file (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4, 8], help="packed rows (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a row (default: %(default)s)")
    args = parser.parse_args()
    measured_on = provenance(0)
    bars: list[Bar] = []
    cases = []
    for rows in args.rows:
        print(f"=== {rows} rows of {args.tokens} tokens", flush=True)
        found, raw = measure(rows, args.tokens, args.repeats)
        bars += found
        cases.append(raw)
    print(f"\n{table(bars)}")
    write_result(
        args.output,
        {
            "what": "processor seconds of forward and backward; peak: transient bytes of torch's allocator",
            "model": f"{MODEL.label} L{LAYERS} V{VOCABULARY}, {DOCUMENTS} documents a row",
            "repeats": args.repeats,
            "bars": [bar.record() for bar in bars],
            "cases": cases,
            "provenance": measured_on | {"finished": provenance(0)["finished"]},
        },
    )


if __name__ == "__main__":
    main()
