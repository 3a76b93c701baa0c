"""Adapters as other tools wrote them, on the tiny bases: settings and factors by the names that these tools give."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."
# What PEFT 0.13 wrote into the settings of a published Mixtral adapter; it did not name its version.
OLD_SETTINGS: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3", "gate"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    """A folder with these tensors and the old settings, but for those given."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({**OLD_SETTINGS, **settings}))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def random_factors(modules: Iterable[tuple[str, tuple[int, ...], int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Factors `lora_A` [r, in] and `lora_B` [out, r] for each module: its path, the shape of its weight, its rank."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (outputs, inputs), r in modules:
        tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.randn(r, inputs, generator=generator) / inputs**0.5
        tensors[f"{PREFIX}{path}.lora_B.weight"] = 0.1 * torch.randn(outputs, r, generator=generator)
    return tensors
