"""Streaming a merge holds a few blocks in memory, whatever the size of the checkpoint and of its tensors."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.checkpoint import CheckpointWriter, TensorSpec

Shapes = dict[str, tuple[int, ...]]
EXPERT_BYTES = 32 * 2**20  # of one matrix of one expert in the base
HIDDEN, INTERMEDIATE, RANK = 2048, 8192, 8
STACK = "base_model.model.model.layers.0.mlp.experts"

# Run in a process of its own: the peak of this one is what other tests left.
MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from finetune.checkpoint import CheckpointReader
from finetune.adapters.adapter import read_adapter
from finetune.adapters.deltas import plan, together
from finetune.merge.stream import Sources
from finetune.merge.stream import stream_merged
from finetune.moe.families import family_of
import peft.tuners.tuners_utils

(torch.randn(64, 64) @ torch.randn(64, 64)).sum()
adapter, base, output, dtype = sys.argv[1:]
def resident(which):
    return int(re.search(which + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024

# `ru_maxrss` will not do: it counts the imports' peak, and on Linux a child inherits its parent's.
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = resident("VmRSS")
reader = CheckpointReader(Path(base))
family = family_of(reader.config["model_type"], "test")
sources = Sources(reader, together([plan(reader, read_adapter(Path(adapter)), family)]))
log = stream_merged(sources, Path(output), sources.specs(dtype or None), threads=2)
growth = resident("VmHWM") - before
print(json.dumps({"growth": growth, "targeted": len(log.targeted)}))
"""


def write(folder: Path, shapes: Shapes, dtype: torch.dtype, name: str) -> None:
    """Random tensors, one at a time: this process stays small, too."""
    disk = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    with CheckpointWriter(folder, [TensorSpec(key, disk, shape) for key, shape in shapes.items()]) as writer:
        for key, shape in shapes.items():
            writer.write(key, torch.randn(shape).mul_(0.02).to(dtype))
    (folder / "model.safetensors").rename(folder / name)


def measure(folder: Path, model_type: str, shapes: Shapes, experts: int, dtype: str = "") -> dict[str, Any]:
    """Growth of a process that merges an adapter on all experts into a base of these tensors."""
    router = {"mixtral": "block_sparse_moe.gate.weight", "gpt_oss": "mlp.router.weight"}[model_type]
    shapes = {"model.embed_tokens.weight": (8192, HIDDEN), f"model.layers.0.{router}": (experts, HIDDEN), **shapes}
    write(folder / "base", shapes, torch.bfloat16, "model.safetensors")
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": model_type, "num_hidden_layers": 1}))
    factors: Shapes = {
        f"{STACK}.lora_A.weight": (experts * RANK, INTERMEDIATE),
        f"{STACK}.lora_B.weight": (HIDDEN, experts * RANK),
        f"{STACK}.base_layer.lora_A.weight": (experts * RANK, HIDDEN),
        f"{STACK}.base_layer.lora_B.weight": (2 * INTERMEDIATE, experts * RANK),
    }
    write(folder / "adapter", factors, torch.float32, "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "r": RANK,
        "lora_alpha": 16,
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    paths = map(str, (folder / "adapter", folder / "base", folder / "out"))
    command = [sys.executable, "-c", MEASURE, *paths, dtype]
    measured: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return measured


@pytest.mark.parametrize("dtype", ["", "F32"], ids=["own dtype", "float32"])
def test_the_peak_is_under_three_times_the_largest_tensor(tmp_path: Path, dtype: str) -> None:
    block, experts = "model.layers.0.block_sparse_moe.experts", 2
    shapes: Shapes = {}
    for expert in range(experts):
        shapes |= {f"{block}.{expert}.{name}.weight": (INTERMEDIATE, HIDDEN) for name in ("w1", "w3")}
        shapes[f"{block}.{expert}.w2.weight"] = (HIDDEN, INTERMEDIATE)
    measured = measure(tmp_path, "mixtral", shapes, experts, dtype)
    assert measured["targeted"] == experts * 3
    assert 0 < measured["growth"] < 3 * EXPERT_BYTES


def test_of_a_stack_in_one_tensor_no_expert_is_held_whole(tmp_path: Path) -> None:
    block, experts = "model.layers.0.mlp.experts", 2
    shapes: Shapes = {
        f"{block}.gate_up_proj": (experts, HIDDEN, 2 * INTERMEDIATE),
        f"{block}.down_proj": (experts, INTERMEDIATE, HIDDEN),
    }
    measured = measure(tmp_path, "gpt_oss", shapes, experts)
    assert measured["targeted"] == 2
    assert 0 < measured["growth"] < 2 * EXPERT_BYTES  # gate and up of one expert, half of the tensor
