"""Correction biases of routers that training has moved: they lie beside the adapter and replace the base's."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from finetune.checkpoint import CheckpointReader, TensorInfo
from finetune.checkpoint.reader import read_header, read_tensor
from finetune.errors import Problem, WeightsError
from finetune.moe.families import Family
from finetune.moe.router_bias import BIAS_FILE, find_biases


def bias_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Where the moved biases of an adapter folder lie, by their names in the loaded model; empty where none are."""
    return read_header(folder / BIAS_FILE) if (folder / BIAS_FILE).is_file() else {}


def fixed_tensors(base: CheckpointReader, folder: Path, family: Family) -> dict[str, TensorInfo]:
    """The correction biases of the merged model by their keys on disk, moved or not; their number format is kept.

    They are added to scores that differ by little: rounded to 16 bits they would choose other experts.
    Raises WeightsError unless the base has each one that was moved, in the same shape.
    """
    name = None if family.moe is None else family.moe.disk_correction_bias
    found = {key: base.info(key) for key in base.keys if name is not None and key.endswith(f".{name}")}
    for name, info in bias_tensors(folder).items():
        key = _disk_name(name, family)
        if not base.holds(key) or base.info(key).shape != info.shape:
            what, do = "these correction biases are not this base's", "merge into the base it was trained on"
            raise WeightsError(Problem(str(folder / BIAS_FILE), what, do, got=f"{name} {list(info.shape)}"))
        found[key] = info
    return found


def _disk_name(name: str, family: Family) -> str:
    moe = family.moe
    if moe is None or moe.correction_bias is None or not name.endswith(f".{moe.correction_bias}"):
        return name
    return name.removesuffix(moe.correction_bias) + str(moe.disk_correction_bias)


@contextmanager
def moved_biases(model: torch.nn.Module, biases: dict[str, TensorInfo], family: Family) -> Iterator[None]:
    """Within it those of the biases that `model` holds have their moved values."""
    found = {} if family.moe is None or not biases else find_biases(model, family.moe)
    held = {name: bias for name, bias in found.items() if name in biases}
    own = {name: bias.data for name, bias in held.items()}
    for name, bias in held.items():
        bias.data = read_tensor(biases[name]).view_as(bias)
    try:
        yield
    finally:
        for name, bias in held.items():
            bias.data = own[name]
