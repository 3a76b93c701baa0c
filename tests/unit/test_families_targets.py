"""Targets where architectures differ: parts that PEFT would take for experts, names that a user types, other dtypes."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from finetune.moe.audit import audit_model, differences
from finetune.moe.families import FAMILIES
from tests.bases import with_lora
from tests.families import save_tiny
from tests.unit.engine import base_model, dense_twin, logits, lora_settings, trained_model


def adapted_names(model: Any) -> set[str]:
    """Names below the decoder layers of all that has factors."""
    factors = (name for name, _ in model.named_parameters() if ".lora_A." in name)
    return {name.partition(".layers.")[2].partition(".lora_A.")[0].partition(".")[2] for name in factors}


GATED = ("gate_proj", "up_proj", "down_proj")
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


@pytest.mark.parametrize(
    ("model_type", "targets", "adapted"),
    [
        ("qwen3_moe", ["mlp"], [f"mlp.{name}" for name in GATED]),
        ("deepseek_v3", ["shared_experts"], [f"mlp.shared_experts.{name}" for name in GATED]),
        ("deepseek_v2", ["attention"], [f"self_attn.{name}" for name in LATENT]),
        ("hunyuan_v1_moe", ["router"], ["mlp.gate.wg"]),
        ("qwen2_moe", ["mlp.shared_expert.up_proj", "mlp.shared_expert_gate"], None),
        ("jamba", ["mamba.in_proj", "feed_forward.up_proj"], None),
    ],
    ids=["dense layers", "shared experts", "latent attention", "router", "by name", "by name, mamba"],
)
def test_a_target_reaches_what_it_names_and_stock_peft_reads_it_so(
    model_type: str, targets: list[str], adapted: list[str] | None, tmp_path: Path
) -> None:
    folder = save_tiny(model_type, tmp_path / "base")
    model = trained_model(folder, targets=targets).eval()
    assert adapted_names(model) == set(adapted or targets)
    settings = lora_settings(targets=targets)
    assert differences(audit_model(model, FAMILIES[model_type]), settings, load_in_4bit=True, dtype="float32") == []
    model.save_pretrained(str(tmp_path / "adapter"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of factors that it has no place for
        stock = PeftModel.from_pretrained(dense_twin(model, folder), tmp_path / "adapter").eval()
    with stock.disable_adapter():
        base = logits(stock)
    torch.testing.assert_close(logits(model), logits(stock), atol=5e-5, rtol=1e-5)
    assert (logits(stock) - base).abs().max() > 1e-2


def test_an_adapter_of_linear_layers_is_fresh_and_in_32_bits_like_any_other(tmp_path: Path) -> None:
    model = base_model(save_tiny("qwen2_moe", tmp_path), dtype="bfloat16")
    before = logits(model)
    adapted = with_lora(model, lora_settings(targets=["mlp", "shared_experts", "router"]))
    assert torch.equal(logits(adapted), before)
    assert {p.dtype for n, p in adapted.named_parameters() if ".lora_" in n} == {torch.float32}
    assert {".lora_" in n for n, p in adapted.named_parameters() if p.requires_grad} == {True}


@pytest.mark.parametrize("model_type", ["ernie4_5_moe", "hunyuan_v1_moe", "gpt_oss", "minimax_m2"])
def test_routers_that_an_architecture_keeps_in_32_bits_are_no_difference(model_type: str, tmp_path: Path) -> None:
    targets = list(FAMILIES[model_type].targets)
    model = with_lora(base_model(save_tiny(model_type, tmp_path), dtype="bfloat16"), lora_settings(targets=targets))
    parts = audit_model(model, FAMILIES[model_type])
    assert differences(parts, lora_settings(targets=targets), load_in_4bit=True, dtype="bfloat16") == []
    in_32_bits = {"ernie4_5_moe", "hunyuan_v1_moe"}
    assert set(parts["router"].weights.values()) == {"float32" if model_type in in_32_bits else "bfloat16"}


def test_a_linear_module_of_which_the_table_says_nothing_is_a_difference(tmp_path: Path) -> None:
    model = trained_model(save_tiny("olmoe", tmp_path), targets=["attention"])
    model.get_base_model().model.layers[0].mlp.novelty = torch.nn.Linear(64, 64, bias=False).requires_grad_(False)
    parts = audit_model(model, FAMILIES["olmoe"])
    (problem,) = differences(parts, lora_settings(targets=["attention"]), load_in_4bit=True, dtype="float32")
    assert str(problem) == (
        "audit: other: the table of architectures says nothing of a linear module, which would stay in 16 bits; "
        "got model.layers.0.mlp.novelty.weight; report this model"
    )
