"""A sharded model beside one that each process holds whole: memory while it is loaded, bytes held, time of a step.

    python -m benchmarks.sharding [--write FILE]

A Mixtral of 200 million random parameters (8 layers of 8 experts, NF4) on two processes of this machine over gloo.
Memory is the largest anonymous resident memory of a process while base and adapter are loaded and sharded, beyond what
it had before: pages of the checkpoint's file, which all processes share, are not in it. One repetition, of its steps
the median. The processes share their cores and their memory bus, so only the ratios say something.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from finetune.base import Base
from finetune.parallelism import Parallelism
from finetune.recipe import Recipe

REPETITIONS, PROCESSES, STEPS, TOKENS = 1, 2, 3, 128
SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
}


def write_models(folder: Path) -> None:
    """A random Mixtral in bfloat16, and a small one in `small`."""
    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 512}
    for path, sizes in ((folder, SIZES), (folder / "small", {**SIZES, **small})):
        MixtralForCausalLM(MixtralConfig(**sizes)).to(torch.bfloat16).save_pretrained(path)


def recipe_of(folder: Path) -> Recipe:
    """Adapters of rank 8 on attention and experts."""
    return Recipe.model_validate(
        {
            "output_dir": str(folder / "run"),
            "model": {"name_or_path": str(folder), "load_in_4bit": True, "dtype": "bfloat16"},
            "lora": {"targets": ["attention", "experts"], "r": 8, "lora_alpha": 16},
            "router": {"router_aux_loss_coef": 0.0},
            "method": {"kind": "sft"},
            "data": {"train": {"path": "none.jsonl", "format": "text"}, "max_length": 512},
            "training": {
                "max_steps": 1,
                "learning_rate": 0.001,
                "global_batch_size": 2,
                "per_device_train_batch_size": 1,
                "gradient_checkpointing": "selective",
            },
        }
    )


def base_of(folder: Path) -> Base:
    """The base without a tokenizer, which nothing here needs."""
    from finetune.adapters.record import BaseRecord
    from finetune.model_files import load_config
    from finetune.moe.families import FAMILIES

    record = BaseRecord(name_or_path=str(folder))
    return Base(folder, FAMILIES["mixtral"], load_config(folder), None, (), record)


def anonymous_bytes() -> int:
    """Resident memory of this process that is no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


def growth(action: Callable[[], Any]) -> tuple[Any, int]:
    """What `action` returns, and the largest growth of this process's memory meanwhile, looked at every millisecond."""
    before, largest, ended = anonymous_bytes(), [0], threading.Event()

    def look() -> None:
        while not ended.wait(0.001):
            largest[0] = max(largest[0], anonymous_bytes())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        result = action()
    finally:
        ended.set()
        watcher.join()
    return result, max(largest[0], anonymous_bytes()) - before


def arm(folder: Path, sharded: bool) -> dict[str, Any]:
    """One process of one arm: run under torchrun."""
    from accelerate import PartialState

    from finetune.model import adapt, load_base
    from finetune.moe.audit import audit_model
    from finetune.moe.families import FAMILIES
    from finetune.moe.sharding import shard_model, share_of_this_process

    state = PartialState(cpu=True)
    assert state.num_processes == PROCESSES
    parallelism = Parallelism(PROCESSES, PROCESSES if sharded else 1)

    def load(folder: Path) -> Any:
        recipe, base = recipe_of(folder), base_of(folder)
        torch.manual_seed(0)
        model = adapt(load_base(base, recipe.model, share_of_this_process(parallelism)), base, recipe)
        if sharded:
            shard_model(model, base.family, parallelism)
        return model

    load(folder / "small")  # what is imported for it is not the model's memory
    gc.collect()
    model, grown = growth(partial(load, folder))
    parts = audit_model(model, FAMILIES["mixtral"])
    held = {name: sum(getattr(part, name) for part in parts.values()) for name in ("bytes", "local_bytes")}
    called = model if sharded else torch.nn.parallel.DistributedDataParallel(model)
    return {"growth": grown, **held, "step": step_seconds(called, model, state.process_index)}


def step_seconds(called: Any, model: Any, rank: int) -> float:
    """Median seconds of a step of AdamW on this process's row."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    tokens = torch.randint(4, 8000, (PROCESSES, TOKENS), generator=torch.Generator().manual_seed(1))[rank : rank + 1]
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        called(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def run_arm(folder: Path, name: str) -> list[dict[str, Any]]:
    """Both processes of an arm."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    command = [sys.executable, *words, "-m", "benchmarks.sharding", "--arm", name, "--folder", str(folder)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(PROCESSES)]


def measure(folder: Path, repetitions: int = REPETITIONS) -> dict[str, Any]:
    """Medians of the larger process, and the ratios of the arms."""
    found: dict[str, list[list[dict[str, Any]]]] = {"whole": [], "sharded": []}
    for _ in range(repetitions):
        for name, runs in found.items():
            runs.append(run_arm(folder, name))
    largest = {
        name: {key: statistics.median(max(rank[key] for rank in run) for run in runs) for key in runs[0][0]}
        for name, runs in found.items()
    }
    ratios = {key: largest["sharded"][key] / largest["whole"][key] for key in ("growth", "local_bytes", "step")}
    return {"processes": PROCESSES, "sizes": SIZES, **largest, "sharded/whole": ratios}


def main() -> None:
    """Measure, or be one process of an arm."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=Path)
    parser.add_argument("--arm", choices=["whole", "sharded"])
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.arm is not None:
        figures = arm(args.folder, args.arm == "sharded")
        (args.folder / f"{args.arm}.{os.environ['RANK']}.json").write_text(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder)
        figures = {"torch": torch.__version__, **measure(folder)}
    text = json.dumps(figures, indent=1)
    print(text)
    if args.write is not None:
        args.write.write_text(text + "\n")


if __name__ == "__main__":
    main()
