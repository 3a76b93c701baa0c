"""Merge = adapter on every layout of experts that the table knows: per expert, in one tensor, transposed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.merge import merge
from finetune.moe.families import FAMILIES
from tests.families import CONFIGS, save_tiny
from tests.unit.merge_adapters import load, logits, save_adapter


def adapter_on(base: Path, folder: Path, model_type: str) -> Path:
    """A trained adapter on everything that the family has; PEFT would take `gate_proj` as a module for the experts."""
    family = FAMILIES[model_type]
    assert family.moe is not None
    stacks = [f"{family.moe.experts_module}.{stack.parameter}" for stack in family.moe.stacks]
    linear = [f"{module}.weight" for module in (*family.dense_mlp, *family.moe.shared)]
    return save_adapter(
        base,
        folder,
        r=4,
        lora_alpha=8,
        target_modules=list(family.attention),
        target_parameters=[*stacks, family.moe.router_parameter, *linear],
        rank_pattern=dict.fromkeys(stacks, 3),
        alpha_pattern={stacks[1]: 5},
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_merged_equals_base_plus_adapter(model_type: str, tmp_path: Path) -> None:
    base = save_tiny(model_type, tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter", model_type)
    report = merge(adapter, tmp_path / "merged", show_progress=False)
    adapted = load(base, adapter)
    reference = logits(adapted)
    assert (reference - logits(load(base))).abs().max() > 0.1
    assert (logits(load(tmp_path / "merged")) - reference).abs().max() < 1e-4 * reference.abs().max()
    assert report.changed == report.targeted > 0
    assert {"attention", "experts", "router"} <= set(report.parts)
    # Tensor by tensor what stock PEFT makes of the whole model, and in the base's own layout.
    adapted.merge_and_unload().save_pretrained(tmp_path / "stock")
    plain, merged, stock = tensors(base), tensors(tmp_path / "merged"), tensors(tmp_path / "stock")
    assert plain.keys() == merged.keys() == stock.keys()
    for key, value in stock.items():
        assert torch.allclose(merged[key], value, atol=1e-5), key
    assert sum(not torch.equal(value, merged[key]) for key, value in plain.items()) == report.changed
