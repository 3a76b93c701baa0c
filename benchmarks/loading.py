"""What loading in 4 bits holds at its peak, beyond what stays: on the CPU and on a GPU, in a process of its own.

On the CPU anonymous memory counts. The checkpoint's own pages, which the loader maps, belong to a process's resident
size but can be dropped by the system at any time, and to whoever reads the file.
"""

import json
import select
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralForCausalLM

from benchmarks.harness import Bar
from benchmarks.mixtral import mixtral_config
from benchmarks.shapes import Shape

SMALL, LAYERS = Shape(512, 1792, 8, 2, 0, 0), 3
_TINY = Shape(64, 96, 4, 2, 0, 0)

# Loads a tiny model of the same kind first: all code and buffers are then there. Waits, loads, and tells its bytes.
_CHILD = """
import gc, json, sys
from pathlib import Path
import torch
from transformers import AutoConfig
from finetune.adapters.record import BaseRecord
from finetune.base import Base, check_loads
from finetune.checkpoint import CheckpointReader
from finetune.model import load_base
from finetune.moe.audit import storage_of
from finetune.moe.families import FAMILIES
from finetune.recipe import ModelSettings

def load(folder):
    settings = ModelSettings(name_or_path=folder, load_in_4bit=True, dtype="bfloat16")
    check_loads(CheckpointReader(Path(folder)), FAMILIES["mixtral"], settings)
    base = Base(Path(folder), FAMILIES["mixtral"], AutoConfig.from_pretrained(folder), None, (), BaseRecord())
    return load_base(base, settings)

torch.set_num_threads(1)
load(sys.argv[1])
gc.collect()
cuda = sys.argv[3] == "cuda"
if cuda:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
print("ready", flush=True)
sys.stdin.readline()
model = load(sys.argv[2])
peak = torch.cuda.max_memory_allocated() - before if cuda else None
print(json.dumps({"stored": sum(storage_of(value)[2] for value in model.parameters()), "peak": peak}), flush=True)
"""


@dataclass(frozen=True)
class Loading:
    """Bytes: of the checkpoint in bf16, of one layer's stacks in bf16, that stay, and at the peak while loading."""

    bf16: int
    layer_stacks: int
    stored: int
    peak: int

    @property
    def bars(self) -> tuple[Bar, Bar]:
        """Resident over bf16, and peak over what stays plus one layer's stacks."""
        at = f"{self.bf16 / 2**20:,.0f} MiB in bf16"
        beyond = (self.peak - self.stored) / self.layer_stacks
        return (
            Bar("resident bytes of a loaded model / bf16 bytes", at, self.stored / self.bf16, "<=", 0.27, "memory"),
            Bar("(peak while loading - resident) / one layer's stacks", at, beyond, "<=", 1.0, "memory"),
        )


def measure_loading(shape: Shape = SMALL, layers: int = LAYERS, device: str = "cpu") -> Loading:
    """Write a checkpoint of constant weights in shards, load it, and watch."""
    with tempfile.TemporaryDirectory() as name:
        tiny, large = Path(name, "tiny"), Path(name, "large")
        save_checkpoint(_TINY, 1, tiny)
        bf16 = save_checkpoint(shape, layers, large)
        stored, peak = _load(tiny, large, device)
    return Loading(bf16, stack_bytes(shape), stored, peak)


def stack_bytes(shape: Shape) -> int:
    """Bytes of one layer's experts in bf16."""
    return 3 * 2 * shape.experts * shape.hidden * shape.intermediate


def save_checkpoint(shape: Shape, layers: int, folder: Path) -> int:
    """A bf16 Mixtral in shards; the values do not matter, a third differs from the rest. Returns the bytes."""
    with torch.device("meta"):
        meta: Any = MixtralForCausalLM(mixtral_config(shape, layers, vocabulary=512))
    model = meta.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01).view(-1)[::3] = -0.02
    size: int = sum(parameter.numel() * 2 for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=max(size // 3, 10**6))
    return size


def _load(tiny: Path, large: Path, device: str) -> tuple[int, int]:
    """Bytes that stay, and most bytes beyond those before the load."""
    command = [sys.executable, "-c", _CHILD, str(tiny), str(large), device]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        while (line := child.stdout.readline()).strip() != "ready":
            if not line:
                raise RuntimeError(f"loading failed: {child.stderr.read()}")
        before = _anonymous_bytes(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        peak = 0
        while not select.select([child.stdout], [], [], 0.001)[0]:  # one look a millisecond
            peak = max(peak, _anonymous_bytes(child.pid))
        line = child.stdout.readline()
        if not line:
            raise RuntimeError(f"loading failed: {child.stderr.read()}")
        result = json.loads(line)
    return result["stored"], peak - before if result["peak"] is None else result["peak"]


def _anonymous_bytes(process_id: int) -> int:
    status = Path(f"/proc/{process_id}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024
