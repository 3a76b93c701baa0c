"""A tiny Mixtral whose weights follow from the names of its tensors: the same in every version of every library."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

IDS = (5, 17, 300, 8, 42, 7)
COLUMNS = 48  # of the logits that are kept
DIMENSIONS: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "sliding_window": None,
    "tie_word_embeddings": False,
}


def values(name: str, shape: tuple[int, ...], size: float) -> torch.Tensor:
    """Values between -size and size that look random and depend on the name."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (size * torch.sin(count * 12.9898 + zlib.crc32(name.encode()) % 10007)).float().reshape(shape)


def factor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of an adapter by its name in the file."""
    return values(name, shape, 0.3)


def factors(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """All tensors of an adapter's file."""
    return {name: factor(name, tuple(shape)) for name, shape in shapes.items()}


def published_tensors() -> dict[str, torch.Tensor]:
    """The checkpoint by its published names."""
    H, inner, V = DIMENSIONS["hidden_size"], DIMENSIONS["intermediate_size"], DIMENSIONS["vocab_size"]
    shapes = {"model.embed_tokens.weight": (V, H), "lm_head.weight": (V, H), "model.norm.weight": (H,)}
    for layer in range(DIMENSIONS["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}_layernorm.weight": (H,) for name in ("input", "post_attention")}
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (H, H) for name in "qo"}
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (H // 2, H) for name in "kv"}
        shapes[f"{prefix}block_sparse_moe.gate.weight"] = (DIMENSIONS["num_local_experts"], H)
        for expert in range(DIMENSIONS["num_local_experts"]):
            name = f"{prefix}block_sparse_moe.experts.{expert}."
            shapes |= {f"{name}w1.weight": (inner, H), f"{name}w2.weight": (H, inner), f"{name}w3.weight": (inner, H)}
    return {name: values(name, shape, 1.0 if len(shape) == 1 else 0.5) for name, shape in shapes.items()}
