"""Adapters of transformers 4, with a module for each expert, merged into bases of either layout."""

from collections.abc import Callable
from pathlib import Path

import torch

from finetune.merge import merge
from tests.support import save_tiny_mixtral
from tests.unit.foreign_adapters import PREFIX, random_factors, write_adapter
from tests.unit.merge_adapters import tensors


def linear_modules(base: Path, names: str) -> dict[str, tuple[int, ...]]:
    """The matrices of a published base whose last part is one of `names`: a module each in transformers 4."""
    ends = tuple(f".{name}.weight" for name in names.split())
    return {key.removesuffix(".weight"): tuple(v.shape) for key, v in tensors(base).items() if key.endswith(ends)}


def changed_by(adapter: Path, scale: Callable[[str], float] | float) -> dict[str, torch.Tensor]:
    """scale * B A by the name of the base's tensor, straight from the file."""
    factors = tensors(adapter)
    found = {}
    for name, B in factors.items():
        if name.endswith(".lora_B.weight"):
            path = name.removeprefix(PREFIX).removesuffix(".lora_B.weight")
            A = factors[name.replace("lora_B", "lora_A")]
            found[f"{path}.weight"] = (scale if isinstance(scale, float) else scale(path)) * (B @ A)
    return found


def assert_merged(base: Path, merged: Path, deltas: dict[str, torch.Tensor]) -> None:
    before, after = tensors(base), tensors(merged)
    assert before.keys() == after.keys()
    assert deltas.keys() <= before.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value + deltas[key] if key in deltas else value, msg=key)


def test_a_mixtral_adapter_with_dropout(tmp_path: Path) -> None:
    base = save_tiny_mixtral(tmp_path / "base")
    modules = linear_modules(base, "q_proj k_proj v_proj o_proj w1 w2 w3 gate")
    assert len(modules) == 2 * (4 + 4 * 3 + 1)
    factors = random_factors((path, shape, 4) for path, shape in modules.items())
    adapter = write_adapter(tmp_path / "adapter", factors)
    report = merge(adapter, tmp_path / "out", base=base, show_progress=False)
    assert_merged(base, tmp_path / "out", changed_by(adapter, 16 / 4))
    assert report.proof.adapter_tensors == 2 * len(modules)
    assert report.proof.changed == report.targeted == len(modules)
