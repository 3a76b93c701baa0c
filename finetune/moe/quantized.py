"""Weights that 4-bit loading stores in NF4, by name and shape, as the quantiser determines them without weights."""

from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoConfig

from finetune.moe.families import family_of
from finetune.moe.quantizer import MoeNf4Config, MoeNf4Quantizer, is_expert_stack


@dataclass(frozen=True)
class QuantizedWeights:
    """Shapes by name: of linear layers [O, I] (`...q_proj.weight`) and of expert stacks [E, O, I]."""

    linear: dict[str, tuple[int, ...]]
    stacks: dict[str, tuple[int, ...]]


def quantized_weights(config: dict[str, Any]) -> QuantizedWeights:
    """The NF4 weights of a model with this `config.json`, from an empty model as before loading."""
    model_config = AutoConfig.for_model(**config)
    model_class: Any = family_of(model_config.model_type, "config.json: model_type").transformers_class()
    with torch.device("meta"):
        model = getattr(model_class, "from_config", model_class)(model_config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    MoeNf4Quantizer(MoeNf4Config(), pre_quantized=False).preprocess_model(model, device_map=None)
    linear = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    stacks = [name for name in shapes if is_expert_stack(model, name)]
    return QuantizedWeights({name: shapes[name] for name in linear}, {name: shapes[name] for name in stacks})
