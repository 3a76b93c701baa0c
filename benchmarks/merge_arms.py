"""The arms of `benchmarks.merge`: each merges once in a process of its own and prints what it took, as JSON.

The peak is that of resident memory since the imports, as Linux counts it (`VmHWM` after `clear_refs`): `ru_maxrss`
holds the imports' own peak.
"""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import finetune.merge


def main(name: str, base: Path, adapter: Path, out: Path) -> None:
    """Run one arm."""
    merge = ARMS[name]
    _warm_up()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    started = time.perf_counter()
    figures = merge(base, adapter, out)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak": _resident("VmHWM") - before, **figures}))


def _warm_up() -> None:
    """What every arm loads of the libraries, whatever the size of the checkpoint."""
    (torch.randn(64, 64) @ torch.randn(64, 64)).sum()
    config = transformers.MixtralConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.MixtralForCausalLM(config)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


def _resident(which: str) -> int:
    found = re.search(which + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _ours(base: Path, adapter: Path, out: Path, prove: bool) -> dict[str, Any]:
    report = finetune.merge.merge(adapter, out, base=base, prove=prove, show_progress=False)
    return {"stream_seconds": report.stream_seconds, "proof_seconds": report.proof_seconds}


def _stock(base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out)
    return {}


ARMS: dict[str, Callable[[Path, Path, Path], dict[str, Any]]] = {
    "merge": lambda base, adapter, out: _ours(base, adapter, out, prove=False),
    "merge-and-prove": lambda base, adapter, out: _ours(base, adapter, out, prove=True),
    "peft": _stock,
}

if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
