"""What 4-bit training computes with, by its own loader, for the tests of merges into it."""

import json
from pathlib import Path
from typing import Any

import torch

from finetune.moe.families import FAMILIES
from finetune.moe.nf4 import Nf4Stack, linear_weight
from finetune.recipe import ModelSettings
from tests.bases import load_folder
from tests.unit.merge_adapters import adapter_on_all


def loaded_in_4_bits(folder: Path, dtype: str = "float32") -> Any:
    """The base as a run loads it."""
    family = FAMILIES[json.loads((folder / "config.json").read_text())["model_type"]]
    attention = family.attn_implementations[0]
    settings = {"name_or_path": str(folder), "load_in_4bit": True, "dtype": dtype, "attn_implementation": attention}
    return load_folder(folder, ModelSettings.model_validate(settings))


def seen_weights(model: Any) -> dict[str, torch.Tensor]:
    """The values of everything that is stored in NF4, by name in the model."""
    found = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter.data, Nf4Stack):
            found[name] = parameter.data.dequantize()
        elif hasattr(parameter, "quant_state"):
            found[name] = linear_weight(parameter)
    return found


def adapter_in_4_bits(base: Path, folder: Path, dtype: str | None = "float32", **changes: Any) -> Path:
    """An adapter on everything, whose record says that it was trained on `base` in 4 bits (None: in 16)."""
    adapter = adapter_on_all(base, folder, **changes)
    file = adapter / "finetune.json"
    how = {"quantization": None if dtype is None else "nf4", "dtype": dtype or "float32"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **how}))
    return adapter
