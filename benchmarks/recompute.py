"""Whole training steps of a small 4-bit Mixtral under each setting of recomputation: time and peak memory."""

from typing import Any

import torch

from benchmarks.harness import Bar, interleaved
from benchmarks.memory import transient_bytes
from benchmarks.mixtral import adapt_mixtral, mixtral_config, random_mixtral
from benchmarks.shapes import Shape
from finetune.moe.checkpointing import enable_checkpointing
from finetune.recipe.settings import Recomputation

MODES: tuple[Recomputation, ...] = ("none", "selective", "full")
MODEL, LAYERS = Shape(256, 512, 8, 2, 1024, 8), 4
SEQUENCES = 4


def measure_recompute(repeats: int, shape: Shape = MODEL, layers: int = LAYERS) -> tuple[list[Bar], dict[str, Any]]:
    """Bar of selective / full, and the raw figures of all three."""
    config = mixtral_config(shape, layers, vocabulary=512)
    model = adapt_mixtral(random_mixtral(config, torch.float32, "cpu"), shape.rank)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 512, (SEQUENCES, shape.tokens // SEQUENCES), generator=generator)

    def step(mode: Recomputation) -> None:
        enable_checkpointing(model, mode)
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()

    timings = interleaved({mode: lambda mode=mode: step(mode) for mode in MODES}, repeats)  # type: ignore[misc]
    transient = {}
    for mode in MODES:
        model.zero_grad(set_to_none=True)
        transient[mode] = transient_bytes(lambda mode=mode: step(mode))  # type: ignore[misc]
    at = f"{shape.label} L{layers}"
    none = transient["none"]
    bars = [
        Bar("selective / full recomputation, time", at, timings.ratio("selective", "full"), "<=", 0.80, "time"),
        Bar("none / full recomputation, time", at, timings.ratio("none", "full"), "<=", None, "time"),
        Bar("selective / none, transient bytes of a step", at, transient["selective"] / none, "<=", None, "memory"),
        Bar("full / none, transient bytes of a step", at, transient["full"] / none, "<=", None, "memory"),
    ]
    print(f"\n=== recomputation, whole steps of a Mixtral: {at}")
    for mode in MODES:
        print(f"  {mode:<36}{1e3 * timings.median(mode):>9.1f} ms{transient[mode] / 2**20:>9.1f} MiB")
    raw = {mode: {"median_ms": 1e3 * timings.median(mode), "transient_bytes": transient[mode]} for mode in MODES}
    return bars, raw | {"shape": vars(shape), "layers": layers}
