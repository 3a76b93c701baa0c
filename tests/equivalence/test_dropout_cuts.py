"""With `lora_dropout` as without: what must not change a step does not, through the real trainers."""

from pathlib import Path
from typing import Any

import pytest

from finetune.recipe import Recipe
from tests.equivalence.dpo_runs import dpo_recipe, dpo_run, write_pairs
from tests.equivalence.sft_runs import Steps, assert_same_steps, recipe, run

DROPPING = {"targets": ["attention", "experts"], "lora_dropout": 0.1}


def dropping(base: Path, rows: Path, out: Path, **training: Any) -> Recipe:
    """Three steps of eight rows with dropout."""
    plain = recipe(base, rows, out, **training)
    return plain.model_copy(update={"lora": plain.lora.model_copy(update=DROPPING)})


@pytest.fixture(scope="module")
def whole(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """One micro-batch of eight rows a step."""
    return run(dropping(base, rows, tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_neither_micro_batches_nor_checkpointing_change_a_step(
    base: Path, rows: Path, tmp_path: Path, whole: Steps, mode: str
) -> None:
    changes = {"gradient_checkpointing": mode, "per_device_train_batch_size": 2 if mode == "none" else 8}
    assert_same_steps(whole, run(dropping(base, rows, tmp_path, **changes)))


def test_dropout_takes_part_and_another_seed_drops_others(base: Path, rows: Path, tmp_path: Path, whole: Steps) -> None:
    """In the second step: a fresh adapter changes nothing."""
    settings = dropping(base, rows, tmp_path, max_steps=2)
    plain = run(settings.model_copy(update={"lora": settings.lora.model_copy(update={"lora_dropout": 0.0})}))
    assert plain.logs[0]["loss"] == pytest.approx(whole.logs[0]["loss"], abs=1e-6)
    assert abs(plain.logs[1]["loss"] - whole.logs[1]["loss"]) > 1e-3


def test_micro_batches_of_pairs_do_not_change_a_step(base: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    one, four = (
        dpo_run(dpo_recipe(base, pairs, tmp_path / str(size), lora=DROPPING, per_device_train_batch_size=size))
        for size in (8, 2)
    )
    assert_same_steps(one, four, ("loss", "dpo_loss", "balance_loss"))
