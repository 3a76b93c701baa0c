"""An adapter on disk that is not of the adapter in memory is refused by name, before a weight of it is read."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import WeightsError
from finetune.moe.same_adapter import WEIGHTS_FILE, refuse_other_adapter
from tests.support import save_tiny_mixtral
from tests.unit.engine import trained_model

DO = "continue with the model, the recipe and the versions that made it, or start anew in another output_dir"
LAYER = "base_model.model.model.layers.0"


@pytest.fixture
def model(tmp_path: Path) -> object:
    """An adapted model, and its adapter in `tmp_path`."""
    model = trained_model(save_tiny_mixtral(tmp_path / "base"))
    model.save_pretrained(str(tmp_path))
    return model


def complaint(model: object, folder: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        refuse_other_adapter(model, folder)
    return str(caught.value).replace(f"{folder / WEIGHTS_FILE}: ", "")


def edit(folder: Path, changed: dict[str, torch.Tensor | None]) -> None:
    """Set or take away tensors of the saved adapter."""
    tensors = load_file(folder / WEIGHTS_FILE)
    for key, value in changed.items():
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value
    save_file(tensors, folder / WEIGHTS_FILE)


def test_its_own_adapter_is_taken(model: object, tmp_path: Path) -> None:
    refuse_other_adapter(model, tmp_path)


def test_factors_of_single_experts_are_another_layout(model: object, tmp_path: Path) -> None:
    """As adapters of transformers 4 have them."""
    experts = f"{LAYER}.mlp.experts"
    edit(tmp_path, {f"{experts}.lora_A.weight": None, f"{experts}.0.w2.lora_A.weight": torch.zeros(4, 96)})
    assert complaint(model, tmp_path).splitlines() == [
        f"the adapter has no such factors; got {experts}.lora_A.weight; {DO}",
        "the model has no such factors; the adapter was made for another layout; "
        f"got {experts}.0.w2.lora_A.weight; {DO}",
    ]


def test_another_rank_is_another_shape(model: object, tmp_path: Path) -> None:
    name = f"{LAYER}.self_attn.q_proj.lora_A.weight"
    edit(tmp_path, {name: torch.zeros(8, 64)})
    assert complaint(model, tmp_path) == (
        f"{name}: factor has another shape than the model's [4, 64]; got [8, 64]; {DO}"
    )
