"""Merge = adapter on every layout of experts that the table knows: per expert, in one tensor, transposed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from finetune.merge import merge
from finetune.merge.proof import prompt_ids
from tests.families import CONFIGS, save_tiny
from tests.unit.merge_adapters import adapter_on_all, load, tensors


@torch.no_grad()
def logits(model: Any, prompts: list[torch.Tensor]) -> torch.Tensor:
    """Logits [sum T, V] of the whole model, as transformers computes them."""
    return torch.cat([model(prompt[None]).logits[0] for prompt in prompts])


@pytest.mark.parametrize("model_type", CONFIGS)
def test_merged_equals_base_plus_adapter(model_type: str, tmp_path: Path) -> None:
    base = save_tiny(model_type, tmp_path / "base")
    adapter = adapter_on_all(base, tmp_path / "adapter")
    report = merge(adapter, tmp_path / "merged", show_progress=False)
    whole, prompts = load(base, adapter), prompt_ids(AutoTokenizer.from_pretrained(base), ())
    adapted = logits(whole, prompts)
    with whole.disable_adapter():
        effect = (adapted - logits(whole, prompts)).abs()
    near = 1e-4 * adapted.abs().max()
    assert effect.max() > 0.1
    assert (logits(load(tmp_path / "merged"), prompts) - adapted).abs().max() < near
    # What the proof computed layer by layer is what the whole model computes.
    assert report.logits.adapter_effect_mean == pytest.approx(effect.mean().item(), rel=1e-4)
    assert report.logits.merged_error_max < near
    assert report.logits.other_experts == 0
    # Tensor by tensor what stock PEFT makes of the whole model, and in the base's own layout.
    whole.merge_and_unload().save_pretrained(tmp_path / "stock")
    before, merged, stock = tensors(base), tensors(tmp_path / "merged"), tensors(tmp_path / "stock")
    assert before.keys() == merged.keys() == stock.keys()
    for key, value in stock.items():
        assert torch.allclose(merged[key], value, atol=1e-5), key
    assert sum(not torch.equal(value, merged[key]) for key, value in before.items()) == report.proof.changed
    assert report.proof.changed == report.targeted > 0
    assert {"attention", "experts", "router"} <= set(report.parts)
