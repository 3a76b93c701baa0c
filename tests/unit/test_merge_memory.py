"""Streaming a merge holds a few blocks in memory, whatever the size of the checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune.checkpoint import CheckpointWriter, TensorSpec

TENSOR_BYTES = 32 * 2**20
HIDDEN, INTERMEDIATE, EXPERTS, RANK = 2048, 8192, 2, 8

# Run in a process of its own: the peak of this one is what other tests left.
MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from finetune.checkpoint import CheckpointReader
from finetune.merge.adapter import read_adapter
from finetune.merge.deltas import plan
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
deltas = plan(reader, read_adapter(Path(adapter)), family_of("mixtral", "test"))
ledger = stream_merged(reader, deltas, Path(output), dtype or None)
growth = resident("VmHWM") - before
print(json.dumps({"growth": growth, "targeted": len(ledger.targeted)}))
"""


def write(folder: Path, shapes: dict[str, tuple[int, int]], dtype: torch.dtype, name: str) -> None:
    """Random tensors, one at a time: this process stays small, too."""
    disk = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    with CheckpointWriter(folder, [TensorSpec(key, disk, shape) for key, shape in shapes.items()]) as writer:
        for key, shape in shapes.items():
            writer.write(key, torch.randn(shape).mul_(0.02).to(dtype))
    (folder / "model.safetensors").rename(folder / name)


@pytest.mark.parametrize("dtype", ["", "F32"], ids=["own dtype", "float32"])
def test_the_peak_is_under_three_times_the_largest_tensor(tmp_path: Path, dtype: str) -> None:
    block = "model.layers.0.block_sparse_moe.experts"
    shapes = {"model.embed_tokens.weight": (TENSOR_BYTES // 2 // HIDDEN, HIDDEN)}
    for expert in range(EXPERTS):
        for name in ("w1", "w3"):
            shapes[f"{block}.{expert}.{name}.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{block}.{expert}.w2.weight"] = (HIDDEN, INTERMEDIATE)
    write(tmp_path / "base", shapes, torch.bfloat16, "model.safetensors")
    stack = "base_model.model.model.layers.0.mlp.experts"
    factors = {
        f"{stack}.lora_A.weight": (EXPERTS * RANK, INTERMEDIATE),
        f"{stack}.lora_B.weight": (HIDDEN, EXPERTS * RANK),
        f"{stack}.base_layer.lora_A.weight": (EXPERTS * RANK, HIDDEN),
        f"{stack}.base_layer.lora_B.weight": (2 * INTERMEDIATE, EXPERTS * RANK),
    }
    write(tmp_path / "adapter", factors, torch.float32, "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 16,
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    command = [
        sys.executable,
        "-c",
        MEASURE,
        *map(str, (tmp_path / "adapter", tmp_path / "base", tmp_path / "out")),
        dtype,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["targeted"] == EXPERTS * 3
    assert 0 < measured["growth"] < 3 * TENSOR_BYTES
