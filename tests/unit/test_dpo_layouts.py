"""Pairs in four layouts: the same log-probabilities, gradients and balance term."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from trl.trainer.utils import add_fused_lm_head

from finetune.data.tokens.collators import DOCUMENT_PLACES, ROW_PLACES, PairCollator, PairLayout
from finetune.data.types import TokenPair
from finetune.methods.loss_head import fit_head
from finetune.methods.pairs import score_pairs, shared_prompt_mask
from finetune.methods.router_term import RouterTerm
from finetune.moe.checkpointing import enable_checkpointing
from finetune.moe.families import FAMILIES
from finetune.moe.lora import grow_vocabulary
from finetune.recipe import RouterSettings
from finetune.recipe.settings import Recomputation
from tests.bases import with_lora
from tests.support import save_tiny_mixtral
from tests.unit.engine import base_model, lora_settings
from tests.unit.pairs import (
    FIELDS,
    LAYOUTS,
    PACKED,
    PAIRS,
    TOKENIZER,
    assert_same_gradients,
    gradients,
    pair_batch,
    scores_alone,
    scoring_model,
    token_pair,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return scoring_model(folder).train()


def ints(*values: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, np.int32)


SMALL = [
    TokenPair(ints(10, 11, 12), ints(13, 14), ints(13, 14), ints(15), ints(15), "f:1"),
    TokenPair(ints(20), ints(21), ints(21), ints(22, 23, 24), ints(22, -100, 24), "f:2"),
]
TOGETHER = [{"pairs": [0, 1], "split": "train"}]
PAD, NONE = TOKENIZER.pad_token_id, -100


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_token_of_a_numbered_pair_has_the_same_place_in_every_layout(layout: PairLayout) -> None:
    """A shared prompt stands for the prompt of the chosen answer; its last token comes before each answer."""
    pairs = [SMALL[1], SMALL[0]]  # of another index than their order in the row
    batch = pair_batch(layout, pairs, [{"pairs": [1, 0], "split": "train", "index": 7}])
    real = batch["weight"] > 0
    places = dict(zip(batch["places"][real].tolist(), batch["input_ids"][real].tolist(), strict=True))
    wanted = {
        index * ROW_PLACES + branch * DOCUMENT_PLACES + place: token
        for index, pair in enumerate(pairs)
        for branch, (ids, _) in enumerate(pair.answers)
        for place, token in enumerate([*pair.prompt_ids.tolist(), *ids.tolist()])
        if layout != "shared" or branch == 0 or place >= len(pair.prompt_ids) - 1
    }
    assert places == wanted
    assert len(places) == real.sum()
    assert "places" not in pair_batch(layout, pairs, TOGETHER)


def test_padded_rows_are_the_chosen_ones_and_then_the_rejected() -> None:
    batch = pair_batch("padded", SMALL, TOGETHER)
    assert batch["input_ids"].tolist() == [
        [10, 11, 12, 13, 14],
        [20, 21, PAD, PAD, PAD],
        [10, 11, 12, 15, PAD],
        [20, 22, 23, 24, PAD],
    ]
    assert batch["attention_mask"].tolist() == batch["weight"].tolist()
    assert batch["weight"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert batch["shift_labels"].tolist() == [
        [NONE, NONE, 13, 14, NONE],
        [21, NONE, NONE, NONE, NONE],
        [NONE, NONE, 15, NONE, NONE],
        [22, NONE, 24, NONE, NONE],
    ]
    assert batch["answer_index"].tolist() == [[2, 3, 0], [5, 0, 0], [12, 0, 0], [15, 16, 17]]
    assert batch["completion_mask"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 0, 1]]
    assert batch["answer_length"].tolist() == [2, 1, 1, 3]
    assert batch["rows"] == ["f:1", "f:2"]
    assert "position_ids" not in batch


def test_flat_rows_have_the_documents_of_a_pair_side_by_side() -> None:
    batch = pair_batch("flat", SMALL, TOGETHER)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 14, 10, 11, 12, 15, 20, 21, 20, 22, 23, 24]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 0, 1, 2, 3]]
    assert batch["answer_index"].tolist() == [[2, 3, 0], [9, 0, 0], [7, 0, 0], [11, 12, 13]]
    assert batch.keys().isdisjoint({"attention_mask", "document", "branch"})


def test_packed_rows_are_those_of_flat_ones_under_each_other_with_padding_of_one_token_documents() -> None:
    apart = [{"pairs": [0], "split": "train"}, {"pairs": [1], "split": "train"}]
    batch = pair_batch("packed", SMALL, apart)
    assert batch["input_ids"].tolist() == [
        [10, 11, 12, 13, 14, 10, 11, 12, 15],
        [20, 21, 20, 22, 23, 24, PAD, PAD, PAD],
    ]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 0, 0, 0]]
    assert batch["weight"].tolist() == [[1] * 9, [1] * 6 + [0] * 3]
    assert batch["answer_index"].tolist() == [[2, 3, 0], [9, 0, 0], [7, 0, 0], [11, 12, 13]]
    assert batch.keys().isdisjoint({"attention_mask", "document", "branch"})


def test_a_packed_row_alone_is_the_flat_one() -> None:
    packed, flat = (pair_batch(layout, SMALL, TOGETHER) for layout in ("packed", "flat"))
    assert packed.keys() == flat.keys()
    for name, value in packed.items():
        assert torch.equal(value, flat[name]) if isinstance(value, torch.Tensor) else value == flat[name], name


def test_shared_rows_have_a_prompt_once_and_its_last_token_in_both_branches() -> None:
    batch = pair_batch("shared", SMALL, TOGETHER)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 14, 12, 15, 20, 21, 20, 22, 23, 24]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1, 0, 1, 2, 3]]
    assert batch["weight"].tolist() == [[2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]]
    assert batch["document"].tolist() == [[0] * 7 + [1] * 6]
    assert batch["branch"].tolist() == [[0, 0, 1, 1, 1, 2, 2, 1, 1, 2, 2, 2, 2]]
    assert batch["shift_labels"].tolist() == [[NONE, NONE, 13, 14, NONE, 15, NONE, 21, NONE, 22, NONE, 24, NONE]]
    assert batch["answer_index"].tolist() == [[2, 3, 0], [7, 0, 0], [5, 0, 0], [9, 10, 11]]
    assert "attention_mask" not in batch


def test_padding_of_shared_rows_sees_itself_alone() -> None:
    apart = [{"pairs": [0], "split": "train"}, {"pairs": [1], "split": "train"}]
    batch = PairCollator(TOKENIZER, {"train": SMALL}, "shared", pad_to_multiple_of=8)(apart)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 14, 12, 15, PAD], [20, 21, 20, 22, 23, 24, PAD, PAD]]
    assert batch["branch"][1].tolist() == [1, 1, 2, 2, 2, 2, 3, 3]
    assert batch["weight"][1].tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    mask = shared_prompt_mask(batch["document"], batch["branch"], "sdpa", torch.float32)
    assert mask.shape == (2, 1, 8, 8)
    assert mask[1, 0, 6:].int().tolist() == [[0] * 6 + [1, 0], [0] * 7 + [1]]
    assert mask[0, 0, 5].int().tolist() == [1, 1, 0, 0, 0, 1, 0, 0]
    added = shared_prompt_mask(batch["document"], batch["branch"], "eager", torch.bfloat16)
    assert added.dtype == torch.bfloat16
    assert torch.equal(added == 0, mask)


def test_the_reference_travels_with_its_pairs() -> None:
    values = {"train": np.array([[-1.0, -2.0], [-3.0, -4.0]])}
    features = [{"pairs": [1], "split": "train"}, {"pairs": [0], "split": "train"}]
    batch = PairCollator(TOKENIZER, {"train": SMALL}, "shared", values)(features)
    assert batch["ref_chosen_logps"].tolist() == [-3.0, -1.0]
    assert batch["ref_rejected_logps"].tolist() == [-4.0, -2.0]
    assert batch["ref_chosen_logps"].dtype == torch.float32
    assert batch["rows"] == ["f:2", "f:1"]


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_every_layout_tells_and_teaches_what_one_document_at_a_time_does(folder: Path, load_in_4bit: bool) -> None:
    model = scoring_model(folder, load_in_4bit).train()
    alone = scores_alone(model)
    wanted = gradients(model, alone)
    outputs = {layout: score_pairs(model, pair_batch(layout), "sdpa") for layout in LAYOUTS}
    for output in outputs.values():
        torch.testing.assert_close(output.log_probs, alone, atol=1e-5, rtol=1e-5)
        assert_same_gradients(gradients(model, output.log_probs), wanted)
        for name in FIELDS:
            torch.testing.assert_close(output[name], outputs["padded"][name], atol=1e-5, rtol=1e-5)
            assert not output[name][~output.label_mask].any()
        assert output.is_top1.dtype == torch.bool
        assert torch.equal(output.label_mask, alone != 0)


def test_in_double_precision_the_layouts_differ_by_rounding_only(folder: Path) -> None:
    """TRL's head computes in float32 whatever it is given, so this reads the model's own logits."""
    model = scoring_model(folder).double()
    alone = scores_alone(model)
    batch = pair_batch("shared")
    mask = shared_prompt_mask(batch["document"], batch["branch"], "sdpa", torch.float64)
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask).logits
    every = logits.log_softmax(-1).gather(-1, batch["shift_labels"].clamp_min(0).unsqueeze(-1)).reshape(-1)
    shared = every[batch["answer_index"]].masked_fill(batch["completion_mask"] == 0, 0)
    # Norms, routers and rotations are float32 in every precision: 1e-7 of what they give.
    torch.testing.assert_close(shared, alone, atol=2e-7, rtol=0)
    assert_same_gradients(gradients(model, shared), gradients(model, alone), 1e-6)


def term_of(model: Any, layout: PairLayout) -> tuple[torch.Tensor, torch.Tensor, RouterTerm]:
    """Scores and balance term of one micro-batch, with frequencies that are not uniform."""
    batch = pair_batch(layout)
    settings = RouterSettings(router_aux_loss_coef=1.0, router_z_loss_coef=0.1)
    term = RouterTerm(model, FAMILIES["mixtral"], settings)
    term.begin_step(batch["weight"].sum(), logged=True)
    term.balance.frequency_LE = torch.tensor([[0.9, 0.6, 0.3, 0.2], [0.1, 0.4, 0.8, 0.7]])
    with term.capture() as record:
        scores = score_pairs(model, batch, "sdpa").log_probs
    extra = term.add(torch.zeros(()), record, batch["weight"].reshape(-1), ranks=1)
    term.end_step(lambda sums: sums)
    return scores, extra, term


def test_the_balance_term_counts_the_tokens_of_the_plain_path(model: Any) -> None:
    results = {layout: term_of(model, layout) for layout in LAYOUTS}
    scores, extra, plain = results["padded"]
    assert plain._last is not None
    tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in PAIRS)
    assert (plain._last.count_LE.sum(-1) == 2 * tokens).all()
    assert plain._last.changed_L.min() > 0
    wanted = gradients(model, scores, extra)
    assert any(
        (wanted[name] - value).abs().max() > 0.01 * value.abs().max()
        for name, value in gradients(model, term_of(model, "padded")[0]).items()
    )
    for layout in ("packed", "flat", "shared"):
        other_scores, other_extra, term = results[layout]
        assert term._last is not None
        assert torch.equal(term._last.count_LE, plain._last.count_LE)
        for name in ("value", "z", "changed_L"):
            torch.testing.assert_close(getattr(term._last, name), getattr(plain._last, name), atol=0, rtol=1e-5)
        torch.testing.assert_close(other_extra, extra, atol=0, rtol=1e-5)
        assert_same_gradients(gradients(model, other_scores, other_extra), wanted)


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpointing_changes_nothing(model: Any, layout: PairLayout, mode: Recomputation) -> None:
    plain, plain_extra, _ = term_of(model, layout)
    wanted = gradients(model, plain, plain_extra)
    enable_checkpointing(model, mode)
    try:
        scores, extra, _ = term_of(model, layout)
        assert torch.equal(scores, plain)
        assert_same_gradients(gradients(model, scores, extra), wanted, 1e-6)
    finally:
        enable_checkpointing(model, "none")


def test_through_ddp_the_wrapper_is_called_once(model: Any, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped, calls = DistributedDataParallel(model), []
        wrapped.register_forward_hook(lambda *_: calls.append(1))
        scores = score_pairs(wrapped, pair_batch("shared"), "sdpa").log_probs
        scores.sum().backward()
        assert calls == [1]
        assert sum(parameter.grad is not None for parameter in model.parameters()) > 0
        torch.testing.assert_close(scores, score_pairs(model, pair_batch("shared"), "sdpa").log_probs, atol=0, rtol=0)
    finally:
        dist.destroy_process_group()
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_changed_pair_changes_nothing_in_its_neighbours(model: Any, layout: PairLayout) -> None:
    changed = [token_pair(9, 4, 7, 11), *PAIRS[1:]]
    with torch.no_grad():
        before, after = (
            score_pairs(model, pair_batch(layout, pairs), "sdpa").log_probs.unflatten(0, (2, 3))
            for pairs in (PAIRS, changed)
        )
    torch.testing.assert_close(after[:, 1:], before[:, 1:], atol=1e-6, rtol=0)
    assert (after[:, 0] - before[:, 0]).abs().max() > 0.1


def test_the_answers_of_a_pair_do_not_see_each_other(model: Any) -> None:
    first = PAIRS[0]
    other = TokenPair(
        first.prompt_ids, first.chosen_ids + 1, first.chosen_labels, first.rejected_ids, first.rejected_labels, "f:1"
    )
    with torch.no_grad():
        before, after = (
            score_pairs(model, pair_batch("shared", [pair], [PACKED[0] | {"pairs": [0]}]), "sdpa").log_probs
            for pair in (first, other)
        )
    torch.testing.assert_close(after[1], before[1], atol=1e-6, rtol=0)
    assert (after[0] - before[0]).abs().max() > 0.1


def test_rows_of_added_tokens_are_scored_and_learnt(folder: Path) -> None:
    """PEFT keeps them apart from embedding and head, whose weight the fused head reads itself."""
    tokens = [512, 513]
    base = base_model(folder)
    grow_vocabulary(base, tokens)
    add_fused_lm_head(base, outputs=FIELDS)
    fit_head(base)
    model = with_lora(base, lora_settings(), tokens)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    answer = ints(512, 7, 513)
    pairs = [TokenPair(ints(5, 512, 9), answer, answer, ints(6), ints(6), "f:1")]
    alone = scores_alone(model, pairs)
    scores = score_pairs(model, pair_batch("shared", pairs, [{"pairs": [0], "split": "train"}]), "sdpa").log_probs
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=1e-5)
    wanted = gradients(model, alone)
    assert sum("trainable_tokens_delta" in name and bool(value.any()) for name, value in wanted.items()) == 2
    assert_same_gradients(gradients(model, scores), wanted)


def test_fields_that_the_head_was_not_asked_for_are_none(folder: Path) -> None:
    base = base_model(folder)
    add_fused_lm_head(base)
    fit_head(base)
    output = score_pairs(base, pair_batch("shared"), "sdpa")
    assert output.log_probs.shape == (6, 7)
    assert output.entropy is None
