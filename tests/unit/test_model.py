"""A base that does not fit the recipe is refused before any weight is read."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.base import checkpoint_family
from finetune.checkpoint import resolve_checkpoint
from finetune.errors import FinetuneError, RecipeError
from finetune.recipe import Recipe
from tests.support import save_tiny_mistral, save_tiny_mixtral


def recipe_for(folder: Path, router: bool = True) -> Recipe:
    settings: dict[str, Any] = {
        "output_dir": "run",
        "model": {"name_or_path": str(folder), "load_in_4bit": True, "dtype": "float32"},
        "lora": {"targets": ["attention"], "r": 2, "lora_alpha": 4.0},
        "method": {"kind": "sft"},
        "data": {"train": {"path": "rows.jsonl", "format": "messages"}, "max_length": 64},
        "training": {"max_steps": 1, "learning_rate": 1e-3, "global_batch_size": 1},
    }
    if router:
        settings["router"] = {"router_aux_loss_coef": 0.1}
    return Recipe.model_validate(settings)


def complaint(folder: Path, router: bool = True) -> str:
    recipe = recipe_for(folder, router)
    with pytest.raises(FinetuneError) as caught:
        checkpoint_family(resolve_checkpoint(recipe.model.name_or_path), recipe)
    return str(caught.value)


def edit_config(folder: Path, **fields: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def test_a_base_that_fits_is_named(tmp_path: Path) -> None:
    assert checkpoint_family(save_tiny_mixtral(tmp_path), recipe_for(tmp_path)).model_type == "mixtral"


def test_a_folder_that_is_not_there() -> None:
    assert complaint(Path("/nowhere/model")) == (
        "model.name_or_path: no such folder; got /nowhere/model; give a checkpoint folder or a hub id owner/name"
    )


def test_a_hub_id_that_cannot_be_had() -> None:
    message = complaint(Path("somebody/some-model"))
    assert message.startswith("model.name_or_path: neither a folder here nor a model that can be fetched (")
    assert message.endswith(
        "got somebody/some-model; check the path or hub id; HF_HUB_OFFLINE is set: unset it, or fetch the model first"
    )


def test_an_moe_without_and_a_dense_model_with_a_router_section(tmp_path: Path) -> None:
    moe, dense = save_tiny_mixtral(tmp_path / "moe"), save_tiny_mistral(tmp_path / "dense")
    assert complaint(moe, router=False) == (
        "router: mixtral is a Mixture-of-Experts model and the recipe has no router section; add "
        "router.router_aux_loss_coef (0 turns the balance term off; the checkpoint's own is never used)"
    )
    assert complaint(dense) == ("router: mistral is a dense model without a router; remove the router section")


def test_all_that_does_not_fit_is_said_at_once(tmp_path: Path) -> None:
    recipe = recipe_for(save_tiny_mistral(tmp_path))
    recipe = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"targets": ["attention", "experts"]})})
    with pytest.raises(RecipeError) as caught:
        checkpoint_family(tmp_path, recipe)
    assert [problem.where for problem in caught.value.problems] == ["router", "lora.targets"]


def test_an_incomplete_checkpoint_is_refused_before_any_data_is_read(tmp_path: Path) -> None:
    folder = save_tiny_mixtral(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    absent = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    del tensors[absent]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert complaint(folder).startswith(f"{folder}: {absent}: the checkpoint has no such tensor; ")


def test_a_checkpoint_of_pickles(tmp_path: Path) -> None:
    folder = save_tiny_mixtral(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in complaint(folder)


def test_a_target_or_attention_that_cannot_be_is_refused_before_the_weights_are_read(tmp_path: Path) -> None:
    folder = save_tiny_mixtral(tmp_path)
    recipe = recipe_for(folder)
    wrong_target = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"targets": ["mlp"]})})
    with pytest.raises(FinetuneError, match=r"lora.targets: mixtral has no mlp"):
        checkpoint_family(folder, wrong_target)
    flash = recipe.model.model_copy(update={"attn_implementation": "flash_attention_2"})
    if find_spec("flash_attn") is None:
        with pytest.raises(FinetuneError, match=r"the package flash_attn is not installed; got flash_att"):
            checkpoint_family(folder, recipe.model_copy(update={"model": flash}))
