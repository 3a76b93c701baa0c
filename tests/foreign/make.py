"""Makes the adapters of this folder. Run in an environment of the versions that the folder is named after:

    python -m tests.foreign.make transformers-4     (transformers 4.46.3, peft 0.13.2)
    python -m tests.foreign.make peft-0.18          (transformers 5.0.0, peft 0.18.1)

A folder gets the settings that PEFT saved, the names and shapes of the tensors beside them, whose values follow from
these, and the logits of base and adapter as these versions computed them.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from tests.foreign.model import COLUMNS, DIMENSIONS, IDS, factor, factors, published_tensors

SETTINGS: dict[str, dict[str, Any]] = {
    "transformers-4": {
        "r": 2,
        "lora_alpha": 6,
        "lora_dropout": 0.05,
        "target_modules": "all-linear",
        "rank_pattern": {"w2": 3},
        "alpha_pattern": {"w3": 9},
    },
    "peft-0.18": {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}


def main(kind: str) -> None:
    """Write one folder."""
    with tempfile.TemporaryDirectory() as base:
        MixtralConfig(**DIMENSIONS, architectures=["MixtralForCausalLM"]).save_pretrained(base)
        save_file(published_tensors(), f"{base}/model.safetensors", metadata={"format": "pt"})
        model = MixtralForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **SETTINGS[kind])).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(factor(name.replace(".default", ""), tuple(parameter.shape)))
        logits = adapted(torch.tensor([IDS])).logits[0, :, :COLUMNS]
    folder = Path(__file__).parent / kind
    adapted.peft_config["default"].base_model_name_or_path = "mistralai/Mixtral-8x7B-v0.1"
    with tempfile.TemporaryDirectory() as saved:
        adapted.save_pretrained(saved, save_embedding_layers=False)
        tensors = load_file(f"{saved}/adapter_model.safetensors")
        folder.mkdir(exist_ok=True)
        shutil.copy(f"{saved}/adapter_config.json", folder)
    shapes = {name: list(value.shape) for name, value in sorted(tensors.items())}
    for name, value in factors(shapes).items():
        assert torch.equal(value, tensors[name]), name
    rounded = [[round(value, 6) for value in row] for row in logits.tolist()]
    (folder / "made.json").write_text(json.dumps({"shapes": shapes, "logits": rounded}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
