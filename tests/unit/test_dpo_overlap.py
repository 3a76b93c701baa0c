"""Overlap of the experts that two models, or two answers, go through: against a plain loop."""

from typing import Any

import pytest
import torch

from finetune.methods.pairs import score_pairs
from finetune.moe.families import FAMILIES
from finetune.moe.router import RouterRecord, answer_overlap, capture, find_routers, policy_overlap
from tests.support import save_tiny_mixtral
from tests.unit.pairs import LAYOUTS, PAIRS, pair_batch, scoring_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return scoring_model(save_tiny_mixtral(tmp_path_factory.mktemp("base")))


def record_of(model: Any, batch: dict[str, Any]) -> RouterRecord:
    moe = FAMILIES["mixtral"].moe
    assert moe is not None
    with torch.no_grad(), capture(find_routers(model, moe.router_module)) as record:
        score_pairs(model, batch, "sdpa")
    return record


def same(indices_TK: torch.Tensor, one: int, other_TK: torch.Tensor, other: int) -> bool:
    return set(indices_TK[one].tolist()) == set(other_TK[other].tolist())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_policy_against_reference_counts_every_real_token(model: Any, layout: Any) -> None:
    batch = pair_batch(layout)
    policy = record_of(model, batch)
    with model.disable_adapter():
        reference = record_of(model, batch)
    overlap = policy_overlap(policy, reference, batch["weight"])
    weight = batch["weight"].flatten().tolist()
    for layer, (ours, theirs) in enumerate(zip(policy.indices, reference.indices, strict=True)):
        wanted = sum(weight[t] * same(ours, t, theirs, t) for t in range(len(weight)))
        assert overlap.same_L[layer] == wanted
        assert 0 < wanted < sum(weight)
    assert overlap.tokens == sum(weight)
    unchanged = policy_overlap(policy, policy, batch["weight"])
    assert (unchanged.same_L == unchanged.tokens).all()


def test_the_layout_does_not_matter(model: Any) -> None:
    by_layout = []
    for layout in LAYOUTS:
        batch = pair_batch(layout)
        policy = record_of(model, batch)
        with model.disable_adapter():
            of_policy = policy_overlap(policy, record_of(model, batch), batch["weight"])
        of_answers = answer_overlap(policy, batch["answer_index"], batch["answer_length"])
        by_layout.append([of_policy.same_L.tolist(), of_answers.same_L.tolist(), of_answers.tokens.item()])
    assert by_layout[0] == by_layout[1] == by_layout[2]
    assert by_layout[0][2] == sum(min(len(p.chosen_ids), len(p.rejected_ids)) for p in PAIRS)


def test_chosen_against_rejected_goes_as_far_as_both_do(model: Any) -> None:
    batch = pair_batch("padded")
    record, T = record_of(model, batch), batch["input_ids"].shape[1]
    overlap = answer_overlap(record, batch["answer_index"], batch["answer_length"])
    for layer, indices in enumerate(record.indices):
        wanted = 0
        for row, pair in enumerate(PAIRS):
            for j in range(min(len(pair.chosen_ids), len(pair.rejected_ids))):
                place = len(pair.prompt_ids) + j
                wanted += same(indices, row * T + place, indices, (len(PAIRS) + row) * T + place)
        assert overlap.same_L[layer] == wanted
    assert 0 < overlap.same_L.sum() < 2 * overlap.tokens


def test_sums_of_micro_batches_add_up(model: Any) -> None:
    parts = []
    for pairs in (PAIRS[:2], PAIRS[2:]):
        batch = pair_batch("shared", pairs, [{"pairs": list(range(len(pairs))), "split": "train"}])
        parts.append(answer_overlap(record_of(model, batch), batch["answer_index"], batch["answer_length"]))
    whole = pair_batch("shared")
    wanted = answer_overlap(record_of(model, whole), whole["answer_index"], whole["answer_length"])
    total = parts[0] + parts[1]
    assert torch.equal(total.same_L, wanted.same_L)
    assert total.tokens == wanted.tokens
