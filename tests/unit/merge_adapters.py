"""Real PEFT adapters for the tests of the merge: made by stock PEFT on a tiny base, with factors that are not zero."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from finetune.checkpoint import fingerprint
from finetune.moe.families import FAMILIES

IDS = torch.arange(4, 84)
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
ROUTER = "mlp.gate.weight"
EVERYTHING: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": [*EXPERTS, ROUTER],
}


def load(folder: Path, adapter: Path | None = None) -> Any:
    """Stock model in fp32, with the stock adapter."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    model = FAMILIES[model_type].transformers_class().from_pretrained(folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()


def save_adapter(base: Path, folder: Path, b_std: float = 0.05, record: bool = True, **lora: Any) -> Path:
    """An adapter on `base` whose B matrices are normal with `b_std` (0: fresh), and the trainer's record."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **(lora or EVERYTHING)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=b_std)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    if record:
        content = {
            "base": {"name_or_path": str(base), "fingerprint": fingerprint(base)},
            "layout": {"expert_lora": "A:expert-major,B:rank-major"},
        }
        (folder / "finetune.json").write_text(json.dumps(content))
    return folder


def logits(model: Any) -> torch.Tensor:
    """Logits [T, V] on fixed token ids."""
    with torch.no_grad():
        result: torch.Tensor = model(IDS[None]).logits[0]
    return result


def adapter_on_all(base: Path, folder: Path, **changes: Any) -> Path:
    """A trained adapter on every part that the base's architecture has.

    Dense layers and shared experts as parameters: PEFT takes a module called `gate_proj` for the experts.
    """
    family = FAMILIES[json.loads((base / "config.json").read_text())["model_type"]]
    assert family.moe is not None
    stacks = [f"{family.moe.experts_module}.{stack.parameter}" for stack in family.moe.stacks]
    linear = [f"{module}.weight" for module in (*family.dense_mlp, *family.moe.shared)]
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": list(family.attention),
        "target_parameters": [*stacks, family.moe.router_parameter, *linear],
        "rank_pattern": dict.fromkeys(stacks, 3),
        "alpha_pattern": {stacks[1]: 5},
    }
    return save_adapter(base, folder, **{**settings, **changes})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint or adapter folder."""
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}
