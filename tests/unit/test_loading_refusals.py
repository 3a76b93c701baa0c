"""A checkpoint that is not what its config.json says is refused by its headers, with the tensor and what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DbrxConfig, Llama4TextConfig

from finetune.checkpoint import CheckpointReader
from finetune.errors import FinetuneError, WeightsError
from finetune.moe.preflight import check_loadable, unreached_experts
from tests.families import save_tiny
from tests.support import save_tiny_mixtral
from tests.unit.engine import base_model

Tensors = dict[str, torch.Tensor]
EXPERT = "model.layers.1.block_sparse_moe.experts.3.{}.weight"


def damaged(folder: Path, damage: Callable[[Tensors], Any]) -> Path:
    """The checkpoint of `folder` with its tensors changed by `damage`."""
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit_config(folder: Path, **fields: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def complaint(folder: Path, load_in_4bit: bool = True) -> str:
    with pytest.raises(FinetuneError) as caught:
        base_model(folder, load_in_4bit)
    return str(caught.value)


@pytest.mark.parametrize("load_in_4bit", [True, False])
@pytest.mark.parametrize("names", [("w2",), ("w1",), ("w1", "w2", "w3")])
def test_a_missing_expert_is_named(tmp_path: Path, names: tuple[str, ...], load_in_4bit: bool) -> None:
    absent = [EXPERT.format(name) for name in names]
    folder = damaged(save_tiny_mixtral(tmp_path), lambda tensors: [tensors.pop(name) for name in absent])
    found = complaint(folder, load_in_4bit).splitlines()
    stacks = {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
    assert sorted(found) == sorted(
        f"{folder}: {name}: the checkpoint has no such tensor; model.layers.1.mlp.experts.{stacks[short]} needs one "
        "for each expert; give a complete checkpoint"
        for short, name in zip(names, absent, strict=True)
    )


def test_an_expert_with_a_number_of_its_own_is_not_taken_for_the_missing_one(tmp_path: Path) -> None:
    """Experts 0, 1, 2 and 7 are as many as are needed; the loader would take 7 for 3."""
    folder = damaged(
        save_tiny_mixtral(tmp_path),
        lambda tensors: tensors.update({EXPERT.format("w2").replace("3.w2", "7.w2"): tensors.pop(EXPERT.format("w2"))}),
    )
    assert f"{folder}: {EXPERT.format('w2')}: the checkpoint has no such tensor; " in complaint(folder)


def test_an_expert_of_another_shape_is_named_with_its_file(tmp_path: Path) -> None:
    name = EXPERT.format("w2")
    folder = damaged(save_tiny_mixtral(tmp_path), lambda tensors: tensors.update({name: torch.zeros(64, 80)}))
    assert complaint(folder) == (
        f"{folder}/model.safetensors: {name}: its fellow experts are [64, 96]; got [64, 80]; "
        "fetch the checkpoint again, or give the one that config.json describes"
    )


def test_a_layer_without_experts_is_named(tmp_path: Path) -> None:
    folder = damaged(
        save_tiny_mixtral(tmp_path),
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1" in name and ".w2." in name],
    )
    assert complaint(folder) == (
        f"{folder}: checkpoint and architecture differ: missing_keys; got model.layers.1.mlp.experts.down_proj; "
        "give a complete checkpoint"
    )


@pytest.mark.parametrize(
    ("model_type", "width"),
    [("mixtral", "intermediate_size"), ("granitemoe", "intermediate_size"), ("mistral4", "moe_intermediate_size")],
)
def test_stacks_of_another_width_than_the_config_says(tmp_path: Path, model_type: str, width: str) -> None:
    folder = edit_config(save_tiny(model_type, tmp_path), **{width: 40})
    found = complaint(folder)
    assert found.startswith(f"{folder}: checkpoint and architecture differ: mismatched_keys; got model.layers.")
    assert "experts.down_proj is [" in found
    assert "40], " in found
    assert found.endswith("; give a complete checkpoint")


def test_a_tensor_too_many_and_one_too_few(tmp_path: Path) -> None:
    folder = damaged(
        save_tiny_mixtral(tmp_path), lambda tensors: tensors.update({"model.extra": tensors.pop("model.norm.weight")})
    )
    differ = f"{folder}: checkpoint and architecture differ"
    assert complaint(folder).splitlines() == [
        f"{differ}: missing_keys; got model.norm.weight; give a complete checkpoint",
        f"{differ}: unexpected_keys; got model.extra; give a complete checkpoint",
    ]


@pytest.mark.parametrize(
    ("method", "remedy"),
    [
        ("bitsandbytes", "give the 16-bit checkpoint; model.load_in_4bit quantises it while loading"),
        ("moe_nf4", "give the 16-bit checkpoint; model.load_in_4bit quantises it while loading"),
        (
            "mxfp4",
            "write a bfloat16 copy: from_pretrained(..., quantization_config=Mxfp4Config(dequantize=True)), then "
            "save_pretrained",
        ),
        (
            "fp8",
            "write a bfloat16 copy: from_pretrained(..., quantization_config=FineGrainedFP8Config(dequantize=True)), "
            "then save_pretrained",
        ),
    ],
)
def test_a_checkpoint_that_is_quantised_already(tmp_path: Path, method: str, remedy: str) -> None:
    folder = edit_config(save_tiny_mixtral(tmp_path), quantization_config={"quant_method": method})
    assert complaint(folder) == f"{folder}/config.json: the checkpoint is already quantised; got {method}; {remedy}"


def test_8bit_weights_that_the_config_does_not_mention(tmp_path: Path) -> None:
    name = EXPERT.format("w2")
    folder = damaged(
        save_tiny_mixtral(tmp_path), lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)})
    )
    assert complaint(folder) == (
        f"{folder}: 1 tensors are stored in 8 bits or fewer, and config.json does not say how to read them; "
        f"got {name} in F8_E4M3; give the 16-bit checkpoint; model.load_in_4bit quantises it while loading"
    )


@pytest.mark.parametrize(
    "name",
    [
        EXPERT.format("w2"),
        EXPERT.format("w3"),
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.block_sparse_moe.gate.weight",
        "model.norm.weight",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, name: str, value: float) -> None:
    """In 4 bits an expert's or a linear layer's NaN would be an ordinary number, and its block garbage."""
    folder = damaged(save_tiny_mixtral(tmp_path), lambda tensors: tensors[name].view(-1)[5:6].fill_(value))
    in_the_model = {
        EXPERT.format("w2"): "model.layers.1.mlp.experts.down_proj, expert 3",
        EXPERT.format("w3"): "model.layers.1.mlp.experts.gate_up_proj, expert 3",
        "model.layers.1.block_sparse_moe.gate.weight": "model.layers.1.mlp.gate.weight",
    }
    assert complaint(folder) == (
        f"{in_the_model.get(name, name)}: holds NaN or infinity; fetch the checkpoint again, or repair this tensor in "
        f"{folder}"
    )


def test_every_damaged_weight_is_named_at_once_also_in_16_bits(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)]
    folder = damaged(
        save_tiny_mixtral(tmp_path),
        lambda tensors: [tensors[name.replace("mlp", "block_sparse_moe")].fill_(float("inf")) for name in names],
    )
    assert [line.partition(":")[0] for line in complaint(folder, load_in_4bit=False).splitlines()] == names


@pytest.mark.parametrize(
    ("config", "stack"),
    [
        (Llama4TextConfig(num_hidden_layers=1), "model.layers.0.feed_forward.experts.gate_up_proj"),
        (
            DbrxConfig(d_model=64, n_heads=4, n_layers=1, attn_config={"kv_n_heads": 2, "rope_theta": 1e4}),
            "transformer.blocks.0.ffn.experts.mlp.w1",
        ),
    ],
    ids=["llama4", "dbrx"],
)
def test_experts_that_4bit_loading_would_not_reach_are_found(config: Any, stack: str) -> None:
    with torch.device("meta"):
        assert stack in unreached_experts(AutoModelForCausalLM.from_config(config))


def test_unreached_experts_are_refused_in_4_bits_and_loaded_in_16(tmp_path: Path) -> None:
    """Whatever the table of families says: an architecture that it does not know passes its door by mistake here."""
    config = Llama4TextConfig(
        hidden_size=64,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        num_local_experts=2,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    check_loadable(CheckpointReader(tmp_path), AutoModelForCausalLM, load_in_4bit=False)
    with pytest.raises(WeightsError) as caught:
        check_loadable(CheckpointReader(tmp_path), AutoModelForCausalLM, load_in_4bit=True)
    assert str(caught.value).splitlines()[0] == (
        "model.layers.0.feed_forward.experts.gate_up_proj: these experts would stay in 16 bits: transformers does not "
        "dispatch them through ExpertsInterface; use a supported architecture (`finetune families`), or "
        "model.load_in_4bit: false"
    )
