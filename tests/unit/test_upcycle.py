"""An upcycled model is the dense model, cut into experts: logits, layout, noise, config."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.checkpoint import CheckpointReader
from finetune.upcycle import Options, upcycle
from tests.support import CHATML, save_tiny_llama, save_tiny_mistral

PLAIN = Options(num_experts=4, top_k=2)
SCALED_ROPES = (
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
)


def logits(folder: Path, length: int = 48) -> torch.Tensor:
    """fp32 logits `[2, length, V]` by stock transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, 512, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits
    return result


def assert_same_model(dense: Path, moe: Path, length: int = 48) -> None:
    wanted, found = logits(dense, length), logits(moe, length)
    assert wanted.std() > 0.1  # a model that says nothing would pass any comparison
    assert (wanted - found).abs().max() < 1e-4


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("save", [save_tiny_llama, save_tiny_mistral], ids=["llama", "mistral"])
def test_logits_equal_the_dense_models(tmp_path: Path, save: Any, tied: bool) -> None:
    dense = save(tmp_path / "dense", tie_word_embeddings=tied)
    upcycle(dense, tmp_path / "moe", PLAIN)
    assert_same_model(dense, tmp_path / "moe")
    assert ("lm_head.weight" in CheckpointReader(tmp_path / "moe").keys) is not tied


def test_two_upcycled_models_are_the_same_bytes(tmp_path: Path) -> None:
    dense, options = save_tiny_llama(tmp_path / "dense"), Options(num_experts=4, top_k=2, noise=0.01)
    for name in ("one", "two"):
        upcycle(dense, tmp_path / name, options)
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert "SHA256SUMS" in one


@pytest.mark.parametrize("rope", SCALED_ROPES, ids=lambda rope: rope["rope_type"])
def test_scaled_ropes_are_carried(tmp_path: Path, rope: dict[str, Any]) -> None:
    dense = save_tiny_llama(tmp_path / "dense", rope_parameters={"rope_theta": 500000.0, **rope})
    upcycle(dense, tmp_path / "moe", PLAIN)
    assert_same_model(dense, tmp_path / "moe", length=400)
    written = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert written["rope_scaling"]["rope_type"] == rope["rope_type"]


def test_a_head_size_of_its_own_and_a_sliding_window_are_carried(tmp_path: Path) -> None:
    dense = save_tiny_mistral(tmp_path / "dense", head_dim=32, sliding_window=8)
    upcycle(dense, tmp_path / "moe", PLAIN)
    assert_same_model(dense, tmp_path / "moe")


def test_a_window_as_long_as_the_context_is_none(tmp_path: Path) -> None:
    dense = save_tiny_mistral(tmp_path / "dense", sliding_window=512)
    upcycle(dense, tmp_path / "moe", PLAIN)
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["sliding_window"] is None


def test_layout_is_the_published_one(tmp_path: Path) -> None:
    dense = tensors(save_tiny_llama(tmp_path / "dense"))
    upcycle(tmp_path / "dense", tmp_path / "moe", PLAIN)
    moe = tensors(tmp_path / "moe")
    for layer in range(2):
        block = f"model.layers.{layer}.block_sparse_moe"
        mlp = f"model.layers.{layer}.mlp"
        assert moe.pop(f"{block}.gate.weight").shape == (4, 64)
        for ours, theirs in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            copies = [moe.pop(f"{block}.experts.{expert}.{ours}.weight") for expert in range(4)]
            assert all(torch.equal(copy, dense[f"{mlp}.{theirs}.weight"]) for copy in copies)
            del dense[f"{mlp}.{theirs}.weight"]
    assert moe.keys() == dense.keys()
    assert all(torch.equal(moe[key], dense[key]) for key in moe)


def test_config_can_be_read_by_programs_that_know_only_the_older_form(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "dense", rope_parameters={"rope_type": "default", "rope_theta": 30000.0})
    upcycle(tmp_path / "dense", tmp_path / "moe", PLAIN)
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 30000.0
    assert (config["num_local_experts"], config["num_experts_per_tok"], config["head_dim"]) == (4, 2, 16)
    assert config["output_router_logits"] is False
    assert config["sliding_window"] is None
    assert config["tie_word_embeddings"] is False


def test_a_config_in_the_older_form_is_understood(tmp_path: Path) -> None:
    dense = save_tiny_llama(tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 700.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (dense / "config.json").write_text(json.dumps(config))
    upcycle(dense, tmp_path / "moe", PLAIN)
    rope = json.loads((tmp_path / "moe" / "config.json").read_text())["rope_parameters"]
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("linear", 700.0, 2.0)
    assert_same_model(dense, tmp_path / "moe")


def test_tokenizer_template_and_generation_config_come_along(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "dense")
    (tmp_path / "dense" / "generation_config.json").write_text('{"eos_token_id": [2, 0], "temperature": 0.6}')
    upcycle(tmp_path / "dense", tmp_path / "moe", PLAIN)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    assert tokenizer.chat_template == CHATML
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    assert json.loads((tmp_path / "moe" / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_a_missing_generation_config_is_made_from_the_config(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "dense")
    (tmp_path / "dense" / "generation_config.json").unlink()
    upcycle(tmp_path / "dense", tmp_path / "moe", PLAIN)
    written = json.loads((tmp_path / "moe" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3}


def test_dtype_is_the_sources_unless_asked_for(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "dense", dtype="bfloat16")
    upcycle(tmp_path / "dense", tmp_path / "same", PLAIN)
    upcycle(tmp_path / "dense", tmp_path / "wide", Options(num_experts=2, top_k=1, dtype="F32"))
    for name, dtype, label in (("same", torch.bfloat16, "bfloat16"), ("wide", torch.float32, "float32")):
        assert {tensor.dtype for tensor in tensors(tmp_path / name).values()} == {dtype}
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == label


def test_shards_are_no_larger_than_asked_for_and_indexed(tmp_path: Path) -> None:
    dense = save_tiny_llama(tmp_path / "dense")
    upcycle(dense, tmp_path / "moe", Options(num_experts=4, top_k=2, max_shard_bytes=200_000))
    shards = sorted((tmp_path / "moe").glob("model-*-of-*.safetensors"))
    index = json.loads((tmp_path / "moe" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(shards) > 2
    assert all(shard.stat().st_size < 200_000 + 10_000 for shard in shards)
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            assert all(index[key] == shard.name for key in file.keys())  # noqa: SIM118  (not a mapping)
    assert_same_model(dense, tmp_path / "moe")


def test_noise_makes_every_expert_differ_by_its_share_of_the_standard_deviation(tmp_path: Path) -> None:
    dense = tensors(save_tiny_llama(tmp_path / "dense"))
    upcycle(tmp_path / "dense", tmp_path / "moe", Options(num_experts=4, top_k=2, noise=0.1))
    moe = tensors(tmp_path / "moe")
    original = dense["model.layers.1.mlp.up_proj.weight"]
    added = [moe[f"model.layers.1.block_sparse_moe.experts.{e}.w3.weight"] - original for e in range(4)]
    for noise in added:
        assert noise.std() == pytest.approx(0.1 * float(original.std()), rel=0.05)
        assert abs(float(noise.mean())) < 0.1 * float(noise.std())
    correlation = torch.corrcoef(torch.stack([noise.flatten() for noise in added]))
    assert (correlation - torch.eye(4)).abs().max() < 0.06
    assert torch.equal(moe["model.embed_tokens.weight"], dense["model.embed_tokens.weight"])
    assert torch.equal(moe["model.layers.1.self_attn.q_proj.weight"], dense["model.layers.1.self_attn.q_proj.weight"])


def test_the_seed_decides_routers_and_noise(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "dense")
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        upcycle(tmp_path / "dense", tmp_path / name, Options(num_experts=4, top_k=2, noise=0.05, seed=seed))
    first, again, other = (tensors(tmp_path / name) for name in ("first", "again", "other"))
    assert all(torch.equal(first[key], again[key]) for key in first)
    for part in ("block_sparse_moe.gate.weight", "block_sparse_moe.experts.3.w2.weight"):
        assert not torch.equal(first[f"model.layers.0.{part}"], other[f"model.layers.0.{part}"])


def test_routers_are_random_and_differ_by_layer(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", PLAIN)
    routers = [tensors(tmp_path / "moe")[f"model.layers.{n}.block_sparse_moe.gate.weight"] for n in range(2)]
    assert all(float(router.std()) == pytest.approx(0.02, rel=0.2) for router in routers)
    assert not torch.equal(routers[0], routers[1])


def test_a_second_copy_of_a_tied_head_is_dropped(tmp_path: Path) -> None:
    dense = save_tiny_llama(tmp_path / "dense", tie_word_embeddings=True)
    weights = load_file(dense / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    upcycle(dense, tmp_path / "moe", PLAIN)
    assert "lm_head.weight" not in CheckpointReader(tmp_path / "moe").keys
    assert_same_model(dense, tmp_path / "moe")
