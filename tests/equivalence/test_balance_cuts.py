"""Balance term, z-loss and correction bias through the real trainer: a step is the same however it is cut."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.methods.sft import MoeSftTrainer
from finetune.recipe import Recipe
from tests.equivalence import sft_runs
from tests.equivalence.sft_runs import Steps, assert_same_steps, run, trainer_for, write_rows
from tests.families import save_tiny

KEYS = ("loss", "ce_loss", "balance_loss", "router/z_loss", "router/max_load", "router/changed")
BOTH = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.05}


def recipe(base: Path, rows: Path, out: Path, router: dict[str, Any], **training: Any) -> Recipe:
    """Plain SGD: Adam would divide the rounding of a gradient near 0 by its own size."""
    return sft_runs.recipe(base, rows, out, router, **{"optim": "sgd", "learning_rate": 0.3, **training})


@pytest.fixture(scope="module")
def whole(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """Three steps of one micro-batch of eight rows with balance term and z-loss."""
    return run(recipe(base, rows, tmp_path_factory.mktemp("whole"), BOTH))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_accumulation_does_not_change_the_balance_of_a_step(
    base: Path, rows: Path, tmp_path: Path, whole: Steps, size: int
) -> None:
    """8 x 1 = 4 x 2 = 2 x 4 = 1 x 8, over three steps: every loss and every gradient."""
    assert_same_steps(whole, run(recipe(base, rows, tmp_path, BOTH, per_device_train_batch_size=size)), KEYS)


def test_accumulation_does_not_change_the_pooled_balance_of_a_step(base: Path, rows: Path, tmp_path: Path) -> None:
    router = {**BOTH, "balance": "pooled"}
    whole, cut = (
        run(recipe(base, rows, tmp_path / str(size), router, per_device_train_batch_size=size)) for size in (8, 2)
    )
    assert_same_steps(whole, cut, KEYS)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_does_not_change_the_balance_of_a_step(
    base: Path, rows: Path, tmp_path: Path, whole: Steps, mode: str
) -> None:
    """Also not by the comparison with the base router, which runs within the checkpointed layers."""
    assert_same_steps(whole, run(recipe(base, rows, tmp_path, BOTH, gradient_checkpointing=mode)), KEYS)


ONE_ROW = {"max_length": 512, "global_batch_size": 1, "per_device_train_batch_size": 1}
FOUR_ROWS = {"max_length": 64, "global_batch_size": 4, "per_device_train_batch_size": 4}


@pytest.mark.parametrize(
    ("scope", "attention", "packed_into"),
    [
        ("step", "sdpa", ONE_ROW),
        ("step", "eager", FOUR_ROWS),
        ("step", "sdpa", {**FOUR_ROWS, "per_device_train_batch_size": 2}),
        ("micro_batch", "sdpa", FOUR_ROWS),
    ],
)
def test_packing_does_not_change_the_balance_of_a_step(
    base: Path, tmp_path: Path, scope: str, attention: str, packed_into: dict[str, Any]
) -> None:
    """Eight rows in every step: padded to the longest, packed into one row, or into four of different lengths."""
    eight = write_rows(tmp_path / "eight.jsonl", 8)
    router = {**BOTH, "scope": scope}
    padded = run(recipe(base, eight, tmp_path / "padded", router, max_length=512, attn_implementation=attention))
    shape: dict[str, Any] = {"packing": True, "attn_implementation": attention, **packed_into}
    trainer, packed = trainer_for(recipe(base, eight, tmp_path / "packed", router, **shape))
    lengths = {len(ids) for ids in trainer.train_dataset["input_ids"]}
    assert (len(trainer.train_dataset), len(lengths) > 1) == (shape["global_batch_size"], packed_into != ONE_ROW)
    trainer.train()
    assert_same_steps(padded, packed, (*KEYS, "router/dead_experts", "router/entropy", "num_tokens", "entropy"))


def test_the_balance_of_micro_batches_depends_on_the_cut_in_value_only_through_their_own_frequencies(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    """What is logged as balance_loss in the first step is exact under every cut; what is minimised is not."""
    router = {**BOTH, "scope": "micro_batch"}
    one, eight = (
        run(recipe(base, rows, tmp_path / str(size), router, per_device_train_batch_size=size)) for size in (8, 1)
    )
    assert one.logs[0]["balance_loss"] == pytest.approx(eight.logs[0]["balance_loss"], abs=1e-5)
    assert one.logs[0]["router/z_loss"] == pytest.approx(eight.logs[0]["router/z_loss"], abs=1e-5)
    assert one.logs[0]["loss"] == pytest.approx(
        one.logs[0]["ce_loss"] + 0.1 * one.logs[0]["balance_loss"] + 0.05 * one.logs[0]["router/z_loss"], abs=1e-5
    )
    assert abs(one.logs[0]["loss"] - eight.logs[0]["loss"]) > 1e-4


def test_the_z_loss_reaches_the_gradient(base: Path, rows: Path, tmp_path: Path) -> None:
    without = run(recipe(base, rows, tmp_path / "without", {"router_aux_loss_coef": 0.0}, max_steps=1))
    with_z = run(
        recipe(base, rows, tmp_path / "with", {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.05}, max_steps=1)
    )
    name = next(name for name in without.gradients[0] if ".mlp.gate." in name and "lora_B" in name)
    assert (without.gradients[0][name] - with_z.gradients[0][name]).abs().max() > 1e-4
    logged = with_z.logs[0]
    assert logged["loss"] == pytest.approx(logged["ce_loss"] + 0.05 * logged["router/z_loss"], abs=1e-5)


def test_a_step_whose_load_is_looked_at_is_the_step_that_is_not(
    base: Path, rows: Path, tmp_path: Path, whole: Steps
) -> None:
    """The comparison with the base router runs on logging steps only, and changes nothing."""
    seldom = run(recipe(base, rows, tmp_path, BOTH, logging_steps=3, gradient_checkpointing="full"))
    for ours, theirs in zip(whole.gradients, seldom.gradients, strict=True):
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-4, msg=name)
    assert seldom.logs[0]["balance_loss"] == pytest.approx(
        sum(log["balance_loss"] for log in whole.logs[:3]) / 3, abs=1e-5
    )
    assert seldom.logs[0]["router/changed"] == pytest.approx(whole.logs[2]["router/changed"], abs=1e-6)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("deepseek_v3", tmp_path_factory.mktemp("deepseek"))


BIAS = {"router_aux_loss_coef": 0.0, "bias_update_rate": 0.05}


def biases(trainer: MoeSftTrainer) -> list[list[float]]:
    assert trainer.router_term is not None
    assert trainer.router_term.bias is not None
    return [bias.tolist() for bias in trainer.router_term.bias.biases.values()]


def biases_after(settings: Recipe) -> tuple[Steps, list[list[float]]]:
    trainer, steps = trainer_for(settings)
    trainer.run_from(None)
    return steps, biases(trainer)


@pytest.fixture(scope="module")
def balanced(deepseek: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Steps, list[list[float]]]:
    """Three steps of a DeepSeek-V3 whose correction biases move."""
    return biases_after(recipe(deepseek, rows, tmp_path_factory.mktemp("balanced"), BIAS))


@pytest.mark.parametrize("cut", [{"per_device_train_batch_size": 1}, {"gradient_checkpointing": "selective"}], ids=str)
def test_accumulation_and_checkpointing_do_not_change_bias_balancing(
    deepseek: Path, rows: Path, tmp_path: Path, balanced: tuple[Steps, list[list[float]]], cut: dict[str, Any]
) -> None:
    steps, moved = biases_after(recipe(deepseek, rows, tmp_path, BIAS, **cut))
    assert_same_steps(balanced[0], steps, KEYS)
    assert moved == balanced[1]
    assert steps.logs[0]["router/changed"] == 0, "nothing had moved"
