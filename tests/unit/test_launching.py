"""What is refused or set before a run starts, whatever launched it."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finetune.environment import wait_passively
from finetune.errors import RecipeError, RunError, WeightsError
from finetune.methods.common import accumulation_steps
from finetune.methods.sft import sft_config
from finetune.moe.router import find_routers
from finetune.train import _reject_data_parallel
from tests.support import save_tiny_mixtral
from tests.unit.engine import trained_model
from tests.unit.test_model import recipe_for


def test_threads_wait_passively_unless_the_user_has_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_one_process_that_sees_several_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(RunError, match=r"several GPUs are visible; got 8 GPUs; use --config_file accelerate_configs/"):
        _reject_data_parallel(SimpleNamespace(num_processes=1, device=torch.device("cuda")))
    _reject_data_parallel(SimpleNamespace(num_processes=8, device=torch.device("cuda")))


def test_the_global_batch_is_what_the_recipe_says_for_any_number_of_processes(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    training = recipe.training.model_copy(update={"global_batch_size": 24, "per_device_train_batch_size": 3})
    recipe = recipe.model_copy(update={"training": training})
    assert [accumulation_steps(recipe, processes) for processes in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(RecipeError, match=r"training.global_batch_size: not divisible .* = 3 x 5; got 24; use a mul"):
        accumulation_steps(recipe, 5)


def test_a_trainer_that_counts_other_processes_is_refused(tmp_path: Path) -> None:
    """It would take steps of another size than the recipe's."""
    training = recipe_for(tmp_path).training.model_copy(update={"global_batch_size": 2})
    recipe = recipe_for(tmp_path).model_copy(update={"training": training})
    with pytest.raises(RunError, match=r"launcher: the trainer counts 1 processes where 2 were counted before it; l"):
        sft_config(recipe, tmp_path, {"report_to": []}, num_processes=2)


def test_a_model_without_the_routers_it_should_have_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"mlp.gate: the loaded model has no router of this name"):
        find_routers(torch.nn.Linear(1, 1), "mlp.gate")


def test_an_adapter_on_4bit_stacks_cannot_be_merged_in_memory(tmp_path: Path) -> None:
    model = trained_model(save_tiny_mixtral(tmp_path), targets=["experts"])
    with pytest.raises(WeightsError, match=r"a loaded expert stack cannot be merged in memory; use `finetune merge A"):
        model.merge_adapter()
