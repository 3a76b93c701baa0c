"""The plan for long rows: its arithmetic against measured bytes, on this CPU and as a GPU once gave them."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.long_context import EXPERTS, measure_experts, measure_loop, measure_step
from benchmarks.memory_plan import (
    LAYER,
    MIXTRAL_8X7B,
    MIXTRAL_8X22B,
    activations,
    experts_backward,
    loop_backward,
    markdown,
    plan,
    shipped,
)
from benchmarks.shapes import Shape
from finetune.moe.engine.routed_rows import pieces_of

ROOT = Path(__file__).parents[2]
LONG, RANK = 2**15, 16
SMALL, WIDER = Shape(64, 224, 8, 2, 512, 8), Shape(128, 448, 8, 2, 256, 8)  # bfloat16 is slow on CPUs


def test_the_experts_backward_holds_what_the_plan_says() -> None:
    (small, pieces), (large, more_pieces) = EXPERTS[:2]
    for found in (
        measure_experts(small, 1, torch.float32),
        measure_experts(small, pieces, torch.float32),
        measure_experts(large, more_pieces, torch.float32),
        measure_experts(SMALL, 4, torch.bfloat16),
        measure_loop(small, small.rows, torch.float32),
    ):
        assert 0.95 <= found["measured / planned"] <= 1.08, found


def test_a_step_of_a_scaled_model_holds_what_the_plan_says() -> None:
    """At two sizes, in bfloat16, loss head and adapter's gradients included."""
    for found in (measure_step(SMALL, 2, 4), measure_step(WIDER, 2, 2)):
        assert 0.9 <= found["measured / planned"] <= 1.1, found


def test_the_experts_backward_stays_under_6_gb_at_32k() -> None:
    """Mixtral-8x7B in bfloat16, on GPUs with grouped products and on others, also if one expert has a full chunk."""
    pieces = pieces_of(2 * LONG, 2 * MIXTRAL_8X7B.intermediate)
    inputs = 2 * 2 * LONG * MIXTRAL_8X7B.hidden  # x and the gradient of the output
    assert experts_backward(MIXTRAL_8X7B, LONG, RANK, 1) > 10e9
    assert experts_backward(MIXTRAL_8X7B, LONG, RANK, pieces) + inputs < 6e9
    assert experts_backward(MIXTRAL_8X7B, LONG, RANK, pieces, gate="torch") < 6e9
    assert loop_backward(MIXTRAL_8X7B, LONG, RANK, 2**14) + inputs < 6e9


@pytest.mark.parametrize(("tokens", "place"), [(4096, 2), (16384, 3)])
def test_the_plan_is_what_a_gpu_measured(tokens: int, place: int) -> None:
    """`results/mixtral-gpu.json`, 32 layers under full checkpointing; it was taken before rows were cut."""
    whole = json.loads((ROOT / "benchmarks/results/mixtral-gpu.json").read_text())["whole"]
    step = whole["steps"][place]
    assert (step["tokens"], step["recompute"]) == (tokens, "full")
    resident = plan(MIXTRAL_8X7B, tokens, RANK)
    adapter = MIXTRAL_8X7B.layers * MIXTRAL_8X7B.lora_values(RANK) * 4
    held = resident["base in 4 bits"] + resident["embeddings, head, routers, norms"] + adapter
    assert held == pytest.approx(whole["resident_bytes"], rel=0.01)
    transient = sum(activations(MIXTRAL_8X7B, tokens, RANK, pieces=1).values())
    assert transient == pytest.approx(step["peak_bytes"] - whole["resident_bytes"], rel=0.03)
    assert LAYER == 37


def test_the_docs_show_the_plan() -> None:
    assert markdown(shipped()) in (ROOT / "docs/long-context.md").read_text()


def test_the_plan_fits_80_gb() -> None:
    assert plan(MIXTRAL_8X7B, LONG, RANK)["sum"] < 70e9
    assert plan(MIXTRAL_8X22B, LONG, RANK, shard=8)["sum"] < 70e9
    assert plan(MIXTRAL_8X22B, LONG, RANK)["sum"] > 80e9
