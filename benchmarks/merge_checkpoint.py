"""A Mixtral checkpoint of published shapes with random weights, and an adapter on it, written as streams."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MixtralConfig, PreTrainedTokenizerFast

from finetune.checkpoint import CheckpointReader, CheckpointWriter, TensorSpec

HIDDEN, INTERMEDIATE, EXPERTS, VOCABULARY, KEYS = 4096, 14336, 8, 32000, 1024  # Mixtral-8x7B's
RANK = 16
ROWS_AT_A_TIME = 512
SPREAD = 0.02

Shapes = dict[str, tuple[int, ...]]


def generate(base: Path, adapter: Path, layers: int) -> None:
    """Write both folders."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=EXPERTS,
        architectures=["MixtralForCausalLM"],
    )
    config.save_pretrained(base)
    PreTrainedTokenizerFast(tokenizer_object=_bytes_as_tokens()).save_pretrained(base)
    _write(base, _base_shapes(layers), "BF16")
    _write(adapter, _adapter_shapes(layers), "F32")
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    record = {"base": {"name_or_path": str(base)}, "layout": {"expert_lora": "A:expert-major,B:rank-major"}}
    (adapter / "finetune.json").write_text(json.dumps(record), encoding="utf-8")


def _bytes_as_tokens() -> Tokenizer:
    """A tokenizer that makes one token of each byte, so that the proof's prompts have their full length."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def largest_tensor(folder: Path) -> int:
    """Bytes of the largest tensor on disk."""
    reader = CheckpointReader(folder)
    return max(reader.info(key).nbytes for key in reader.keys)


def _base_shapes(layers: int) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for expert in range(EXPERTS):
            matrix = f"{prefix}block_sparse_moe.experts.{expert}"
            shapes |= {f"{matrix}.{name}.weight": (INTERMEDIATE, HIDDEN) for name in ("w1", "w3")}
            shapes[f"{matrix}.w2.weight"] = (HIDDEN, INTERMEDIATE)
        shapes[f"{prefix}block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
        shapes |= {f"{prefix}self_attn.{name}.weight": (rows, HIDDEN) for name, rows in _ATTENTION.items()}
        shapes |= {f"{prefix}{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    return {**shapes, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


_ATTENTION: Mapping[str, int] = {"q_proj": HIDDEN, "k_proj": KEYS, "v_proj": KEYS, "o_proj": HIDDEN}


def _adapter_shapes(layers: int) -> Shapes:
    shapes: Shapes = {}
    for layer in range(layers):
        prefix = f"base_model.model.model.layers.{layer}."
        experts = f"{prefix}mlp.experts"
        shapes[f"{experts}.base_layer.lora_A.weight"] = (EXPERTS * RANK, HIDDEN)
        shapes[f"{experts}.base_layer.lora_B.weight"] = (2 * INTERMEDIATE, EXPERTS * RANK)
        shapes[f"{experts}.lora_A.weight"] = (EXPERTS * RANK, INTERMEDIATE)
        shapes[f"{experts}.lora_B.weight"] = (HIDDEN, EXPERTS * RANK)
        for name, rows in _ATTENTION.items():
            shapes[f"{prefix}self_attn.{name}.lora_A.weight"] = (RANK, HIDDEN)
            shapes[f"{prefix}self_attn.{name}.lora_B.weight"] = (rows, RANK)
    return shapes


def _write(folder: Path, shapes: Shapes, dtype: str) -> None:
    torch_dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[dtype]
    specs = [TensorSpec(key, dtype, shape) for key, shape in shapes.items()]
    with CheckpointWriter(folder, specs, max_shard_bytes=2**60) as writer:
        for key, shape in shapes.items():
            if len(shape) == 1:
                writer.write(key, torch.ones(shape, dtype=torch_dtype))
                continue
            for start in range(0, shape[0], ROWS_AT_A_TIME):
                rows = torch.randn(min(ROWS_AT_A_TIME, shape[0] - start), shape[1])
                writer.write_rows(key, start, (SPREAD * rows).to(torch_dtype))
