"""The audit counts what stands in memory and names every point in which it is not what the recipe says."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.moe.audit import audit_model, audit_table, differences
from finetune.moe.families import FAMILIES
from tests.support import save_tiny_mistral, save_tiny_mixtral
from tests.unit.engine import lora_settings, trained_model

FAMILY = FAMILIES["mixtral"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("base"))


def complaints(model: Any, load_in_4bit: bool = True, dtype: str = "float32", **lora: Any) -> list[str]:
    parts = audit_model(model, FAMILY)
    return [str(problem) for problem in differences(parts, lora_settings(**lora), load_in_4bit, dtype)]


def experts_of(model: Any, layer: int = 1) -> Any:
    return model.get_base_model().model.layers[layer].mlp.experts.get_base_layer()


def test_a_model_that_is_what_the_recipe_says_has_no_differences(base: Path) -> None:
    assert complaints(trained_model(base)) == []
    assert complaints(trained_model(base, load_in_4bit=False), load_in_4bit=False) == []
    assert complaints(trained_model(base, expert_r=2), expert_r=2) == []
    assert complaints(trained_model(base, targets=["q_proj"]), targets=["q_proj"]) == []


def test_an_expert_stack_left_in_16_bits_is_named(base: Path) -> None:
    model = trained_model(base)
    experts = experts_of(model)
    dense = experts.down_proj.data.dequantize().to(torch.bfloat16)
    experts.down_proj = torch.nn.Parameter(dense, requires_grad=False)
    assert complaints(model) == [
        "audit: experts: the recipe asks for nf4; got 1 tensors in bfloat16; "
        "set model.load_in_4bit and model.dtype to what you want stored"
    ]


def test_a_norm_in_4_bit_parts_hides_no_weight(base: Path) -> None:
    """Vectors inside attention stay as they were; a matrix beside them may not."""
    model = trained_model(base)
    attention = model.get_base_model().model.layers[0].self_attn
    attention.q_norm = torch.nn.LayerNorm(16)
    for parameter in attention.q_norm.parameters():
        parameter.requires_grad_(False)
    attention.k_proj.base_layer.weight = torch.nn.Parameter(torch.randn(32, 64), requires_grad=False)
    assert complaints(model) == [
        "audit: attention: the recipe asks for nf4; got 1 tensors in float32; "
        "set model.load_in_4bit and model.dtype to what you want stored"
    ]


def test_a_4bit_model_under_a_recipe_that_asks_for_none_is_named(base: Path) -> None:
    found = complaints(trained_model(base), load_in_4bit=False)
    assert [line.split(";")[0] for line in found] == [
        "audit: attention: the recipe asks for float32",
        "audit: experts: the recipe asks for float32",
    ]


def test_an_adapter_that_misses_the_experts_is_named(base: Path) -> None:
    found = complaints(trained_model(base, targets=["attention"]), targets=["attention", "experts"])
    assert len(found) == 1
    assert found[0].startswith(
        "audit: experts: the recipe adapts 4 of 4 weights; got 0 adapted; differing: model.layers"
    )


def test_an_adapter_that_reaches_what_the_recipe_does_not_name_is_named(base: Path) -> None:
    found = complaints(trained_model(base), targets=["attention", "experts"])
    assert len(found) == 1
    assert found[0].startswith("audit: router: the recipe adapts 0 of 2 weights; got 2 adapted")


def test_another_rank_and_a_trained_base_are_named(base: Path) -> None:
    assert complaints(trained_model(base, r=8), r=4)[0].startswith(
        "audit: attention: the recipe says rank 4; got rank [8]"
    )
    model = trained_model(base)
    model.get_base_model().lm_head.weight.requires_grad_(True)
    assert complaints(model) == [
        "audit: head: parameters of the base model would be trained; got 32,768; only adapters train; report this"
    ]


def test_the_figures_are_those_of_the_model(base: Path) -> None:
    parts = audit_model(trained_model(base), FAMILY)
    experts = parts["experts"].as_dict()
    assert experts["parameters"] == 2 * 4 * (192 * 64 + 64 * 96)
    assert (experts["adapted"], experts["adaptable"], experts["ranks"]) == (4, 4, [4])
    assert experts["trained"] == 2 * 4 * 4 * ((192 + 64) + (64 + 96))
    assert experts["stored_as"] == {"nf4": 4}
    assert experts["bytes"] < 0.6 * experts["parameters"]
    table = audit_table(parts)
    assert "4 of 4" in table
    assert "8 of 8" in table


def test_a_dense_model_has_attention_and_mlp(tmp_path: Path) -> None:
    model = trained_model(save_tiny_mistral(tmp_path), targets=["attention", "mlp"])
    parts = audit_model(model, FAMILIES["mistral"])
    lora = lora_settings(targets=["attention", "mlp"])
    assert differences(parts, lora, True, "float32") == []
    assert parts["mlp"].as_dict()["adapted"] == 6
    assert parts["experts"].parameters == 0
