"""Merge = adapter on every layout of experts that the table knows: per expert, in one tensor, transposed."""

from pathlib import Path

import pytest
import torch

from finetune.checkpoint import CheckpointReader
from finetune.merge import merge
from finetune.merge.logits import LayerwiseModel
from tests.families import CONFIGS, save_tiny
from tests.unit.merge_adapters import IDS, adapter_on_all, load, logits, tensors


@pytest.mark.parametrize("model_type", CONFIGS)
def test_merged_equals_base_plus_adapter(model_type: str, tmp_path: Path) -> None:
    base = save_tiny(model_type, tmp_path / "base")
    adapter = adapter_on_all(base, tmp_path / "adapter")
    report = merge(adapter, tmp_path / "merged", show_progress=False)
    adapted = load(base, adapter)
    plain, reference = logits(load(base)), logits(adapted)
    near = 1e-4 * reference.abs().max()
    assert (reference - plain).abs().max() > 0.1
    assert (logits(load(tmp_path / "merged")) - reference).abs().max() < near
    # What the proof computes layer by layer is what the whole model computes.
    reader = CheckpointReader(base)
    layerwise = LayerwiseModel(reader, reader.config, adapter).logits([IDS])
    assert (layerwise["plain"] - plain).abs().max() < near
    assert (layerwise["adapted"] - reference).abs().max() < near
    assert report.changed == report.targeted > 0
    assert {"attention", "experts", "router"} <= set(report.parts)
    assert report.logits.merged_error_max < near
    assert report.logits.other_experts == 0
    # Tensor by tensor what stock PEFT makes of the whole model, and in the base's own layout.
    adapted.merge_and_unload().save_pretrained(tmp_path / "stock")
    before, merged, stock = tensors(base), tensors(tmp_path / "merged"), tensors(tmp_path / "stock")
    assert before.keys() == merged.keys() == stock.keys()
    for key, value in stock.items():
        assert torch.allclose(merged[key], value, atol=1e-5), key
    assert sum(not torch.equal(value, merged[key]) for key, value in before.items()) == report.changed
