"""Merge = adapter on every layout of experts that the table knows: per expert, in one tensor, transposed."""

from pathlib import Path

import pytest
import torch

from finetune.merge import merge
from tests.families import CONFIGS, save_tiny
from tests.unit.merge_adapters import adapter_on_all, load, logits, tensors


@pytest.mark.parametrize("model_type", CONFIGS)
def test_merged_equals_base_plus_adapter(model_type: str, tmp_path: Path) -> None:
    base = save_tiny(model_type, tmp_path / "base")
    adapter = adapter_on_all(base, tmp_path / "adapter")
    report = merge(adapter, tmp_path / "merged", show_progress=False)
    adapted = load(base, adapter)
    reference = logits(adapted)
    assert (reference - logits(load(base))).abs().max() > 0.1
    assert (logits(load(tmp_path / "merged")) - reference).abs().max() < 1e-4 * reference.abs().max()
    assert report.changed == report.targeted > 0
    assert {"attention", "experts", "router"} <= set(report.parts)
    assert report.logits.merged_error_max < 1e-4 * reference.abs().max()
    assert report.logits.other_experts == 0
    # Tensor by tensor what stock PEFT makes of the whole model, and in the base's own layout.
    adapted.merge_and_unload().save_pretrained(tmp_path / "stock")
    plain, merged, stock = tensors(base), tensors(tmp_path / "merged"), tensors(tmp_path / "stock")
    assert plain.keys() == merged.keys() == stock.keys()
    for key, value in stock.items():
        assert torch.allclose(merged[key], value, atol=1e-5), key
    assert sum(not torch.equal(value, merged[key]) for key, value in plain.items()) == report.changed
