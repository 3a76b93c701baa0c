"""Makes the adapters of this folder. Run in an environment of the versions that the folder is named after:

    python -m tests.foreign.make transformers-4     (transformers 4.46.3, peft 0.13.2)
    python -m tests.foreign.make peft-0.18          (transformers 5.0.0, peft 0.18.1)

A folder gets the adapter as PEFT saved it, and the logits of base and adapter as these versions computed them.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

from tests.foreign.model import COLUMNS, DIMENSIONS, IDS, published_tensors, values

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
                parameter.copy_(values(name, tuple(parameter.shape), 0.3))
        logits = adapted(torch.tensor([IDS])).logits[0, :, :COLUMNS].contiguous()
    folder = Path(__file__).parent / kind
    adapted.peft_config["default"].base_model_name_or_path = "mistralai/Mixtral-8x7B-v0.1"
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    save_file({"logits": logits}, folder / "logits.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
