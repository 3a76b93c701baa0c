"""Equivalence classes of DPO through the real trainer: what must not change the result does not."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.methods.arguments import evaluation_metrics
from tests.equivalence.dpo_runs import PAIR_KEYS, dpo_recipe, dpo_run, dpo_trainer, write_pairs
from tests.equivalence.sft_runs import TIMINGS, Steps, assert_changes_nothing, assert_same_steps, padded_with_eos

MIXED: dict[str, Any] = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3], "ld_alpha": 0.5}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="module")
def whole(base: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """Three steps of one micro-batch of eight pairs, with a loss over pairs and one over tokens."""
    return dpo_run(dpo_recipe(base, pairs, tmp_path_factory.mktemp("whole"), MIXED))


def same(one: Steps, other: Steps) -> None:
    assert_same_steps(one, other, PAIR_KEYS)
    # In the first step rounding decides which of two rewards of 0 is greater.
    assert one.logs[2]["rewards/accuracies"] == other.logs[2]["rewards/accuracies"]


@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_do_not_change_the_step(base: Path, pairs: Path, tmp_path: Path, whole: Steps, size: int) -> None:
    same(whole, dpo_run(dpo_recipe(base, pairs, tmp_path, MIXED, per_device_train_batch_size=size)))


def test_the_pad_token_may_be_the_eos(base: Path, pairs: Path, tmp_path: Path, whole: Steps) -> None:
    same(whole, dpo_run(padded_with_eos(dpo_recipe(base, pairs, tmp_path, MIXED))))


@pytest.mark.parametrize("packing", [False, True])
def test_pairs_can_be_drawn_by_length(base: Path, pairs: Path, tmp_path: Path, packing: bool) -> None:
    drawn = {"train_sampling_strategy": "group_by_length"}
    changes: dict[str, Any] = {"trainer_args": drawn, "data": {"packing": packing}, "max_steps": 1}
    trainer, _ = dpo_trainer(dpo_recipe(base, pairs, tmp_path, {"prompt_sharing": "off"}, **changes))
    rows, split = trainer.train_dataset, trainer.data_collator._tables["train"]
    documents = [ids for row in rows["pairs"] for index in row for ids, _ in split[index].answers]
    prompts = [len(split[index].prompt_ids) for row in rows["pairs"] for index in row]
    assert sum(rows["length"]) == sum(map(len, documents)) + 2 * sum(prompts)
    lengths = [rows[index]["length"] for step in trainer.get_train_dataloader().batches for index in step]
    assert lengths[:8] == sorted(lengths[:8], reverse=True)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_does_not_change_the_step(
    base: Path, pairs: Path, tmp_path: Path, whole: Steps, mode: str
) -> None:
    same(whole, dpo_run(dpo_recipe(base, pairs, tmp_path, MIXED, gradient_checkpointing=mode)))


def test_a_live_reference_gives_the_steps_of_a_precomputed_one(
    base: Path, pairs: Path, tmp_path: Path, whole: Steps
) -> None:
    live = dpo_run(dpo_recipe(base, pairs, tmp_path, {**MIXED, "reference": "live"}, gradient_checkpointing="full"))
    same(whole, live)
    assert not (tmp_path / "reference").exists()
    assert all(log["router/same_as_reference"] <= 1 for log in live.logs[:3])


def test_sharing_prompts_does_not_change_the_step(base: Path, pairs: Path, tmp_path: Path, whole: Steps) -> None:
    """The router term included: a shared prompt counts for both answers."""
    same(whole, dpo_run(dpo_recipe(base, pairs, tmp_path, {**MIXED, "prompt_sharing": "off"})))


def test_the_first_step_is_that_of_equal_models(whole: Steps) -> None:
    """Rewards are 0, so the pair loss is log 2, and the term that is minimised is its uniform value, top_k."""
    nll = -whole.logs[0]["logps/chosen"]
    assert whole.logs[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert whole.logs[0]["loss"] == pytest.approx(whole.logs[0]["dpo_loss"] + 0.1 * 2.0, abs=1e-5)
    assert whole.logs[0]["dpo_loss"] > math.log(2), nll
    assert whole.logs[0]["router/same_as_reference"] == 1.0
    assert 0 <= whole.logs[2]["router/same_as_reference"] < 1.0
    assert 0 < whole.logs[0]["router/same_in_both_answers"] < 1.0


def test_without_a_coefficient_the_loss_is_that_without_the_term_bit_for_bit(
    base: Path, pairs: Path, tmp_path: Path
) -> None:
    off = {"router_aux_loss_coef": 0.0}
    trainer, with_term = dpo_trainer(dpo_recipe(base, pairs, tmp_path / "with", router=off))
    trainer.train()
    trainer, without = dpo_trainer(dpo_recipe(base, pairs, tmp_path / "without", router=off))
    trainer.router_term = trainer.overlap = None
    trainer.train()
    for one, other in zip(with_term.gradients, without.gradients, strict=True):
        assert all(torch.equal(gradient, other[name]) for name, gradient in one.items())
    assert [log["loss"] for log in with_term.logs[:3]] == [log["loss"] for log in without.logs[:3]]
    assert with_term.logs[1]["balance_loss"] > 0


def test_the_evaluation_does_not_depend_on_its_batches(base: Path, pairs: Path, tmp_path: Path) -> None:
    trainer, _ = dpo_trainer(dpo_recipe(base, pairs, tmp_path, MIXED))
    _train_a_little(trainer)
    evaluations = []
    for trainer.args.per_device_eval_batch_size in (1, 8):
        evaluations.append(trainer.evaluate())
    keys = ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies", "eval_logps/rejected")
    assert all(evaluations[0][key] == pytest.approx(evaluations[1][key], abs=1e-5) for key in keys)
    assert evaluations[0]["eval_rewards/margins"] != 0
    known = {f"eval_{name}" for name in evaluation_metrics("dpo")}
    assert {name for name in evaluations[0] if name not in TIMINGS} == known, "what metric_for_best_model may name"


def _train_a_little(trainer: Any) -> None:
    """The same change of the same adapter: an untrained one is its own reference."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device)


def test_packed_pairs_are_the_same_pairs(base: Path, pairs: Path, tmp_path: Path) -> None:
    """An evaluation of all pairs, packed with and without sharing, in batches of several rows, and one by one."""
    evaluations = []
    for name, packing, sharing in (("a", False, "off"), ("b", True, "auto"), ("c", True, "off")):
        method = {**MIXED, "prompt_sharing": sharing}
        trainer, _ = dpo_trainer(dpo_recipe(base, pairs, tmp_path / name, method, data={"packing": packing}))
        _train_a_little(trainer)
        for trainer.args.per_device_eval_batch_size in (1, 3) if packing else (8,):
            evaluations.append(trainer.evaluate())
        assert trainer.data_collator.layout == {"a": "padded", "b": "shared", "c": "packed"}[name]
    for other in evaluations[1:]:
        for key in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen", "eval_entropy"):
            assert other[key] == pytest.approx(evaluations[0][key], abs=1e-5), key


@pytest.mark.parametrize("layout", ["padded", "packed", "flat", "shared", "shared, eager"])
def test_a_micro_batch_without_pairs_changes_nothing(base: Path, pairs: Path, tmp_path: Path, layout: str) -> None:
    method = {**MIXED, "use_weighting": True, "reference": "precomputed" if layout == "padded" else "live"}
    model = {"attn_implementation": "eager"} if layout.endswith("eager") else {}
    trainer, _ = dpo_trainer(dpo_recipe(base, pairs, tmp_path, method, model=model))
    trainer.data_collator.layout = layout.partition(",")[0]
    assert_changes_nothing(trainer)
