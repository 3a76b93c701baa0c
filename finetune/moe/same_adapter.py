"""Whether an adapter on disk is one of the adapter in memory: the same factors by name and shape.

PEFT loads what fits and only warns of the rest, so that a part of the adapter would stay as it was initialised.
"""

import hashlib
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict

from finetune.checkpoint.reader import read_header
from finetune.errors import Problem, WeightsError
from finetune.moe.router_bias import BIAS_FILE

WEIGHTS_FILE = "adapter_model.safetensors"


def refuse_other_adapter(model: PeftModel, folder: Path) -> None:
    """Raise WeightsError where the adapter in `folder` was made for another layout: no weight of it is read."""
    file = folder / WEIGHTS_FILE
    found = {key: info.shape for key, info in read_header(file).items()}
    wanted = {key: tuple(value.shape) for key, value in _state_of(model).items()}
    do = "continue with the model, the recipe and the versions that made it, or start anew in another output_dir"
    problems = []
    for what, keys in (
        ("the adapter has no such factors", wanted.keys() - found.keys()),
        ("the model has no such factors; the adapter was made for another layout", found.keys() - wanted.keys()),
    ):
        if keys:
            shown = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            problems.append(Problem(str(file), what, do, got=shown))
    for key in sorted(wanted.keys() & found.keys()):
        if wanted[key] != found[key]:
            what = f"factor has another shape than the model's {list(wanted[key])}"
            problems.append(Problem(f"{file}: {key}", what, do, got=str(list(found[key]))))
    if problems:
        raise WeightsError(problems[:5])


def adapter_digest(folder: Path) -> str:
    """SHA-256 (hex) over the adapter's weights: its factors and the correction biases beside them."""
    digest = hashlib.sha256()
    for name in (WEIGHTS_FILE, BIAS_FILE):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _state_of(model: PeftModel) -> dict[str, torch.Tensor]:
    """What is saved of the adapter: not the whole embedding, which PEFT would add where new tokens made it longer."""
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state
