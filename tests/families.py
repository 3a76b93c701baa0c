"""A tiny random model of every architecture that the table of `finetune.moe.families` supports."""

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from finetune.moe.families import FAMILIES
from tests.support import tiny_tokenizer

_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_NUMBERED = {"num_experts": 4, "num_experts_per_tok": 2}
# Latent attention (MLA): queries and keys have a rotated and an unrotated part.
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_GROUPED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
}
_DENSE_FIRST = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
# The published stretching of positions, for tiny lengths.
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_SHARED_QWEN = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1}

CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {**_LOCAL, "sliding_window": None},
    "qwen2_moe": {**_NUMBERED, **_SHARED_QWEN, "num_hidden_layers": 3, "mlp_only_layers": [0]},
    "qwen3_moe": {**_NUMBERED, "moe_intermediate_size": 32, "num_hidden_layers": 3, "mlp_only_layers": [0]},
    "deepseek_v2": {
        **_LATENT,
        **_GROUPED,
        **_DENSE_FIRST,
        "topk_method": "group_limited_greedy",
    },
    "deepseek_v3": {**_LATENT, **_GROUPED, **_DENSE_FIRST},
    "gpt_oss": {
        **_LOCAL,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
        "rope_parameters": _YARN,
    },
    "olmoe": {**_NUMBERED},
    # The noise is wide, so that sampling often chooses another expert than the best.
    "phimoe": {**_LOCAL, "sliding_window": None, "router_jitter_noise": 0.3},
    "granitemoe": {**_LOCAL, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "jamba": {
        **_NUMBERED,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "minimax": {**_LOCAL, "head_dim": 16, "layer_types": ["full_attention", "linear_attention"], "block_size": 16},
    "minimax_m2": {**_LOCAL, "head_dim": 16, "rotary_dim": 8},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
        "num_hidden_layers": 3,
    },
    "glm4_moe": {**_GROUPED, **_DENSE_FIRST, "head_dim": 16},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 16},
    "mistral4": {
        **_LATENT,
        **_GROUPED,
        **_DENSE_FIRST,
        "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
    },
    "qwen3_next": {
        **_NUMBERED,
        **_SHARED_QWEN,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_hidden_layers": 3,
        "mlp_only_layers": [0],
    },
    "dots1": {**_GROUPED, **_DENSE_FIRST},
    "exaone_moe": {
        **_GROUPED,
        "num_experts": 8,
        "num_shared_experts": 1,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
    },
    "mimo_v2_flash": {**_GROUPED, **_DENSE_FIRST, "head_dim": 16},
    "mellum": {**_NUMBERED, "moe_intermediate_size": 32, "head_dim": 16},
    "granitemoeshared": {**_LOCAL, "shared_intermediate_size": 48},
    "flex_olmo": {**_NUMBERED},
    "solar_open": {**_GROUPED, "head_dim": 16},
    "glm4_moe_lite": {**_LATENT, **_GROUPED, "num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]},
}


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """The configuration: hidden 64, two to four layers, four or eight experts, top 2."""
    return CONFIG_MAPPING[model_type](**{**_COMMON, **CONFIGS[model_type], **overrides})


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> Any:
    """A random model. What starts at zero in it (biases, corrections of the scores) does not stay there."""
    torch.manual_seed(seed)
    config = tiny_config(model_type, **overrides)
    model_class = FAMILIES[model_type].transformers_class()
    model = model_class.from_config(config) if hasattr(model_class, "from_config") else model_class(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not tensor.any():
                tensor.normal_(std=0.05 if "correction_bias" in name else 0.2)
    return model.eval()


def save_tiny(model_type: str, folder: Path, dtype: str = "float32", **overrides: Any) -> Path:
    """A random model in its published on-disk layout, with a tokenizer."""
    tiny_model(model_type, **overrides).to(getattr(torch, dtype)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
