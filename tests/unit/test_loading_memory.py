"""What 4-bit loading holds in memory: while it loads, and for good.

Measured on anonymous memory. The checkpoint's own pages, which the loader maps, count into a process's resident size
but can be dropped by the system at any time, and belong to whoever reads the file.
"""

import json
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from finetune.model import load_base
from finetune.moe.nf4 import Nf4Stack
from finetune.recipe import ModelSettings
from tests.families import save_tiny, tiny_config

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE = 3, 8, 512, 1792
LAYER_STACKS = EXPERTS * 3 * HIDDEN * INTERMEDIATE * 2  # bfloat16 bytes of one layer's experts: 44 MB

# Run in a process of its own, which first loads a tiny model of the same kind: all code and buffers are then there.
LOAD = """
import gc, sys
from pathlib import Path
import torch
from finetune.moe.audit import storage_of
from tests.unit.engine import base_model

torch.set_num_threads(1)
base_model(Path(sys.argv[1]), dtype="bfloat16")
gc.collect()
print("ready", flush=True)
sys.stdin.readline()
model = base_model(Path(sys.argv[2]), dtype="bfloat16")
print(sum(storage_of(parameter)[2] for parameter in model.parameters()), flush=True)
"""


def save_large(folder: Path) -> int:
    """Three layers of eight experts in shards, 139 MB; returns the bytes. The values do not matter."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS}
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(tiny_config("mixtral", **sizes, num_local_experts=EXPERTS))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01).view(-1)[::3] = -0.02
    model.save_pretrained(folder, max_shard_size="60MB")
    return sum(parameter.numel() * 2 for parameter in model.parameters())


def anonymous_bytes(process_id: int) -> int:
    status = Path(f"/proc/{process_id}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_peak_while_loading_is_what_stays_and_less_than_one_layers_stacks(tmp_path: Path) -> None:
    bf16_bytes = save_large(tmp_path / "large")
    save_tiny("mixtral", tmp_path / "tiny", "bfloat16")
    with subprocess.Popen(
        [sys.executable, "-c", LOAD, str(tmp_path / "tiny"), str(tmp_path / "large")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        while (line := child.stdout.readline()).strip() != "ready":
            assert line, child.stderr and child.stderr.read()
        before = anonymous_bytes(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        peak = _peak_until_it_speaks(child)
        stored = int(child.stdout.readline())
    assert stored / bf16_bytes <= 0.27
    assert peak - before <= stored + LAYER_STACKS, json.dumps({"growth": peak - before, "stored": stored})


def _peak_until_it_speaks(child: subprocess.Popen[str]) -> int:
    """The largest anonymous memory seen, one look a millisecond."""
    assert child.stdout is not None
    peak = 0
    while not select.select([child.stdout], [], [], 0.001)[0]:
        peak = max(peak, anonymous_bytes(child.pid))
    return peak


class _Largest(TorchDispatchMode):
    """Most values of one tensor given to an operation of bitsandbytes, and of one floating tensor newly made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given = self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = (_real_tensors(tree) for tree in ((args, kwargs), result))
        if func.namespace == "bitsandbytes":
            self.given = max([self.given, *(tensor.numel() for tensor in given)])
        held = {tensor.untyped_storage().data_ptr() for tensor in given}
        new = [tensor for tensor in made if tensor.untyped_storage().data_ptr() not in held]
        self.made = max([self.made, *(tensor.numel() for tensor in new if tensor.is_floating_point())])
        return result


def _real_tensors(tree: Any) -> list[torch.Tensor]:
    leaves = tree_leaves(tree)
    return [
        leaf
        for leaf in leaves
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Nf4Stack) and not leaf.is_meta
    ]


@pytest.mark.parametrize("model_type", ["mixtral", "granitemoe", "gpt_oss"])
def test_no_operation_sees_more_than_one_expert(tmp_path: Path, model_type: str) -> None:
    """One tensor an expert, fused, fused and transposed. bitsandbytes counts in int32: 2^31 values would kill it."""
    folder = save_tiny(model_type, tmp_path, "bfloat16", intermediate_size=256)
    settings = ModelSettings(name_or_path=str(folder), load_in_4bit=True, dtype="bfloat16", attn_implementation="eager")
    with _Largest() as seen:
        load_base(folder, settings)
    one_expert = 2 * 256 * 64
    assert 0 < seen.given <= one_expert
    assert 0 < seen.made <= one_expert
