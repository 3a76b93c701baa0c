"""Adapters as other tools wrote them, on the tiny bases: settings and factors by the names that these tools give."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.unit.merge_adapters import load, tensors

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


def linear_modules(base: Path, names: str) -> dict[str, tuple[int, ...]]:
    """The matrices of a published base whose last part is one of `names`: a module each in transformers 4."""
    ends = tuple(f".{name}.weight" for name in names.split())
    return {key.removesuffix(".weight"): tuple(v.shape) for key, v in tensors(base).items() if key.endswith(ends)}


def changed_by(adapter: Path, scale: Callable[[str], float] | float) -> dict[str, torch.Tensor]:
    """scale * B A by the name of the base's tensor, straight from the file."""
    factors, found = tensors(adapter), {}
    for name, B in factors.items():
        if name.endswith(".lora_B.weight"):
            path = name.removeprefix(PREFIX).removesuffix(".lora_B.weight")
            A = factors[name.replace("lora_B", "lora_A")]
            found[f"{path}.weight"] = (scale if isinstance(scale, float) else scale(path)) * (B @ A)
    return found


def stacked_as_loaded(published: Path, folder: Path) -> Path:
    """A copy of a base that holds its experts as the loaded model does."""
    shutil.copytree(published, folder)
    load(published).save_pretrained(folder, save_original_format=False)
    assert any(key.endswith("experts.gate_up_proj") for key in tensors(folder))
    return folder


def as_published(stacked: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a Mixtral that holds its experts as the loaded model does, as those that are published."""
    found: dict[str, torch.Tensor] = {}
    for key, value in stacked.items():
        module, _, last = key.replace(".mlp.", ".block_sparse_moe.").rpartition(".")
        if last in ("gate_up_proj", "down_proj"):
            names = ("w1", "w3") if last == "gate_up_proj" else ("w2",)
            for name, matrices in zip(names, value.chunk(len(names), dim=1), strict=True):
                found |= {f"{module}.{expert}.{name}.weight": matrix for expert, matrix in enumerate(matrices)}
        else:
            found[f"{module}.{last}"] = value
    return found


def assert_merged(base: Path, merged: Path, deltas: dict[str, torch.Tensor], stacked: bool = False) -> None:
    """Every tensor is the base's, and those with a delta have it; `stacked`: the merged one holds stacks."""
    before, after = tensors(base), tensors(merged)
    after = as_published(after) if stacked else after
    assert before.keys() == after.keys()
    assert deltas.keys() <= before.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value + deltas[key] if key in deltas else value, msg=key)
