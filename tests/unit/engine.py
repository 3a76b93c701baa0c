"""Models of the engine's tests: a tiny real Mixtral, loaded and adapted by the product's own code."""

import json
from pathlib import Path
from typing import Any

import torch

from finetune.moe.dropout import token_keys_of
from finetune.moe.families import FAMILIES
from finetune.moe.nf4 import Nf4Stack, linear_weight
from finetune.recipe import LoraSettings, ModelSettings
from finetune.upstream import clean_name
from tests.bases import load_folder, with_lora

IDS = torch.arange(4, 84).reshape(2, 40)


def lora_settings(**changes: Any) -> LoraSettings:
    """Attention, experts and router at rank 4."""
    return LoraSettings(**{"targets": ["attention", "experts", "router"], "r": 4, "lora_alpha": 8.0, **changes})


def base_model(folder: Path, load_in_4bit: bool = True, dtype: str = "float32") -> Any:
    """The base as a recipe loads it."""
    family = FAMILIES[json.loads((folder / "config.json").read_text())["model_type"]]
    settings = ModelSettings(
        name_or_path=str(folder),
        load_in_4bit=load_in_4bit,
        dtype=dtype,  # type: ignore[arg-type]
        attn_implementation=family.attn_implementations[0],  # type: ignore[arg-type]
    )
    return load_folder(folder, settings)


def trained_model(folder: Path, load_in_4bit: bool = True, seed: int = 0, **lora: Any) -> Any:
    """An adapted model whose factors are not zero, as after some training."""
    torch.manual_seed(seed)
    model = with_lora(base_model(folder, load_in_4bit), lora_settings(**lora))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def begin_dropout(model: Any) -> None:
    """Give the tokens of `IDS` their keys, as the trainer does for a micro-batch."""
    token_keys = token_keys_of(model)
    if token_keys is not None:
        token_keys.begin(seed=0, step=1, places=torch.arange(IDS.numel()))


def dense_twin(model: Any, folder: Path) -> Any:
    """transformers' own model in 32 bits, holding the values that the 4-bit base stands for."""
    family = FAMILIES[model.config.model_type]
    twin = family.transformers_class().from_pretrained(folder, dtype=torch.float32)
    state = {clean_name(name): dense(parameter) for name, parameter in model.named_parameters() if ".lora_" not in name}
    assert set(state) >= {name for name, _ in twin.named_parameters()}
    twin.load_state_dict(state, strict=False)  # buffers are those of the folder
    return twin.eval()


def dense(parameter: Any) -> torch.Tensor:
    """The values a parameter stands for, whatever it is stored as."""
    if isinstance(parameter.data, Nf4Stack):
        return parameter.data.dequantize()
    if hasattr(parameter, "quant_state"):
        return linear_weight(parameter)
    data: torch.Tensor = parameter.data
    return data


def logits(model: Any) -> torch.Tensor:
    """Logits `[2, 40, V]` on fixed ids."""
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result
