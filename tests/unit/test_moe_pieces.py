"""Many rows: cut by tokens, with nothing of their size saved under full checkpointing, the results stay the same."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from finetune.moe import experts as engine
from finetune.moe.checkpointing import kept_routing
from finetune.moe.engine import function, routed_rows
from finetune.moe.engine.routed_rows import GroupedChunk, grouped_chunks, pieces_of
from finetune.moe.experts import experts_forward
from tests.properties.test_experts import Case, build, inputs, leaves_of

CASE = Case(hidden=16, intermediate=8, num_experts=5, rank=4, tokens=23)


def step(case: Case, mode: str, after: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """Output and all gradients of experts in a block, checkpointed or not."""
    module, (x_TH, index_TK, w_TK) = build(case), inputs(case)
    random_TH = torch.randn(case.tokens, case.hidden, generator=torch.Generator().manual_seed(9))
    torch.manual_seed(3)

    def block(x_TH: torch.Tensor) -> torch.Tensor:
        return after(experts_forward(module, x_TH, index_TK, w_TK))

    if mode == "none":
        output = block(x_TH)
    else:
        contexts = partial(kept_routing, save_expensive=mode == "selective")
        output = checkpoint(block, x_TH, use_reentrant=False, context_fn=contexts)
    return [output, *torch.autograd.grad((output * random_TH).sum(), leaves_of(module, x_TH, w_TK))]


def assert_equal(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    """Within 1e-6 of the largest value."""
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).abs().max() <= 1e-6 * max(1.0, float(other.detach().abs().max()))


def set_cut(patch: pytest.MonkeyPatch, grouped: bool, pieces: int) -> None:
    patch.setattr(engine, "_grouped_products", lambda _: grouped)
    patch.setattr(engine, "pieces_of", lambda *_: pieces)


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"bias": True, "gate": "interleaved", "transposed": True}, {"chosen": (1, 3)}, {"top_k": 1}, {"dropout": 0.3}],
    ids=["plain", "gpt_oss", "chosen", "top 1", "dropout"],
)
def test_pieces_give_what_the_whole_gives(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], quantised: bool
) -> None:
    case = replace(CASE, quantised=quantised, **changes)
    for after in (torch.clone, torch.sigmoid):  # the second saves its result: a recompute needs the experts' output
        for grouped in (True, False):
            set_cut(monkeypatch, grouped, pieces=1)
            whole = step(case, "none", after)
            for mode in ("none", "full", "selective"):
                set_cut(monkeypatch, grouped, pieces=3)
                assert_equal(step(case, mode, after), whole)


@pytest.mark.parametrize("grouped", [True, False])
def test_what_full_checkpointing_computes_again_drops_the_same_elements(
    monkeypatch: pytest.MonkeyPatch, grouped: bool
) -> None:
    set_cut(monkeypatch, grouped, pieces=3)
    case = replace(CASE, dropout=0.3)
    saved, again = step(case, "none", torch.clone), step(case, "full", torch.clone)
    assert_equal(again, saved)
    without = step(CASE, "none", torch.clone)
    assert not torch.allclose(saved[0], without[0], atol=1e-3)


def test_full_checkpointing_runs_the_experts_of_many_rows_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch ends a recompute at the last tensor that the layer saves; the backward then computes what it needs."""
    runs: list[bool] = []
    forward = function._forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs.append(kwargs.get("keep", True))
        return forward(*args, **kwargs)

    monkeypatch.setattr(function, "_forward", counted)
    for pieces, after, wanted in (
        (3, torch.clone, [False]),
        (3, torch.sigmoid, [False, False]),
        (1, torch.clone, [True, True]),
    ):
        runs.clear()
        set_cut(monkeypatch, grouped=True, pieces=pieces)
        step(CASE, "full", after)
        assert runs == wanted


def test_pieces_hold_all_rows_of_their_tokens() -> None:
    index_TK = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(t))[:2] for t in range(23)])
    order_R, chunks = grouped_chunks(index_TK, 5, 4)
    assert sorted(order_R.tolist()) == list(range(46))
    assert [chunk.rows for chunk in chunks] == [slice(0, 10), slice(10, 22), slice(22, 34), slice(34, 46)]
    for chunk in chunks:
        assert isinstance(chunk, GroupedChunk)
        rows = order_R[chunk.rows]
        assert sorted(rows.tolist()) == list(range(chunk.rows.start, chunk.rows.stop))
        experts = index_TK.reshape(-1)[rows]
        assert torch.equal(experts, experts.sort(stable=True).values)
        assert torch.equal(experts, chunk.expert_n)


def test_few_rows_stay_whole() -> None:
    """Mixtral-8x7B: whole up to 9,362 tokens, which take 1 GiB in 16 bits."""
    assert [pieces_of(2 * tokens, 28672) for tokens in (512, 4096, 8192, 9362, 9363, 16384, 32768)] == [
        *(1, 1, 1, 1, 3, 4, 7)
    ]
    assert routed_rows.PIECE == 2**28
