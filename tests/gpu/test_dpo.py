"""DPO on a CUDA device: bfloat16, 4 bits, in each layout."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.equivalence.dpo_runs import dpo_recipe, dpo_trainer, write_pairs
from tests.support import save_tiny_mixtral

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "padded": ({"prompt_sharing": "off"}, {}),
    "flat": ({"prompt_sharing": "off"}, {"packing": True}),
    "shared": ({}, {}),
    "shared and packed": ({}, {"packing": True}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wide = {"hidden_size": 128, "intermediate_size": 192, "num_local_experts": 8}
    return save_tiny_mixtral(tmp_path_factory.mktemp("base"), "bfloat16", **wide)


@pytest.mark.parametrize("reference", ["precomputed", "live"])
@pytest.mark.parametrize(("method", "data"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_run_starts_as_its_reference_and_learns_the_preference(
    base: Path, tmp_path: Path, method: dict[str, Any], data: dict[str, Any], reference: str
) -> None:
    recipe = dpo_recipe(
        base,
        write_pairs(tmp_path / "pairs.jsonl"),
        tmp_path / "run",
        {**method, "reference": reference},
        lora={"targets": ["attention", "experts"], "r": 8},
        model={"dtype": "bfloat16"},
        data=data,
        gradient_checkpointing="full",
        learning_rate=0.005,
        max_steps=6,
        global_batch_size=4,
        per_device_train_batch_size=1 if "packing" in data else 2,
    )
    trainer, steps = dpo_trainer(recipe)
    assert next(trainer.model.parameters()).is_cuda == torch.cuda.is_available()
    trainer.train()
    margins = [log["rewards/margins"] for log in steps.logs if "dpo_loss" in log]
    assert abs(margins[0]) < 1e-2
    assert margins[-1] > 0.1, margins
    assert trainer.evaluate()["eval_rewards/accuracies"] > 0.9
