"""A process that may have no more memory from a moment on: every phase of a run says so in the same words."""

import ctypes
import json
import multiprocessing
import os
import resource
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

import finetune.train
from finetune.failures.memory import _status
from finetune.progress import PROGRESS, Progress
from tests.end_to_end.workspaces import write_workspace
from tests.faults.runs import DPO, PAIRS, SECTIONS, SOURCE
from tests.support import save_tiny_mixtral

FORK = multiprocessing.get_context("fork")
MIB = 2**20
LARGE = {"targets": ["attention", "experts"], "r": 64, "lora_alpha": 8}
AUTO = {**LARGE, "experts": "auto", "experts_share": 0.9, "experts_tokens": 1000}
WORDS = 300


def write_recipe(folder: Path, name: str, **sections: Any) -> None:
    write_workspace(folder, **{**SECTIONS, "router": {"router_aux_loss_coef": 0.02}, **sections})
    (folder / "recipe.yaml").rename(folder / name)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 30 MB, long rows and large adapters, so that each phase needs more than Python holds in reserve."""
    folder = tmp_path_factory.mktemp("memory")
    shape: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "max_position_embeddings": 2048,
    }
    save_tiny_mixtral(folder / "base", **shape)
    training = {"max_steps": 2, "save_steps": 1, "learning_rate": 0.01, "global_batch_size": 2}
    whole = {"per_device_train_batch_size": 2, "gradient_checkpointing": "none"}
    short, long = dict(SOURCE), {**SOURCE, "path": "long.jsonl", "max_rows": 3}
    write_recipe(folder, "long.yaml", lora=AUTO, data=rows(long), training={**training, **whole})
    write_recipe(folder, "short.yaml", lora=LARGE, data={**rows(short), "eval": long}, training=training)
    pairs = {**rows(dict(PAIRS)), "overlong": "truncate"}
    write_recipe(folder, "dpo.yaml", method=DPO["method"], data=pairs, training={**training, **whole})
    texts = [{"prompt": "light " * WORDS, "completion": f"{number} " + "on " * WORDS} for number in range(3)]
    write_lines(folder / "long.jsonl", texts)
    prompt = [{"role": "user", "content": "light " * WORDS}]
    answers = {name: [{"role": "assistant", "content": f"{name} " * WORDS}] for name in ("chosen", "rejected")}
    write_lines(folder / "pairs.jsonl", [{"prompt": prompt, **answers}] * 2)
    return folder


def rows(source: dict[str, Any]) -> dict[str, Any]:
    return {"train": source, "max_length": 2048}


def write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


class _Limited(Progress):
    """From the phase `where` on, memory may grow by `mib` only."""

    where, mib = "", 0

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "doing" and value == self.where:
            limit = _status("VmData") + self.mib * MIB
            resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def limited_run(workspace: Path, recipe: str, output_dir: Path, where: str, mib: int) -> None:
    """`finetune train` in a forked process."""
    log = os.open(output_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    tqdm.set_lock(threading.RLock())
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what was freed is given back, and not used again
    os.chdir(workspace)
    os.environ.update(FINETUNE_CACHE=str(workspace / "cache"), ACCELERATE_USE_CPU="true")
    _Limited.where, _Limited.mib = where, mib
    PROGRESS.__class__ = _Limited
    code = finetune.train.main([recipe, f"output_dir={output_dir}"])
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("where", "recipe", "mib", "saved"),
    [
        ("loading the base", "long.yaml", 6, "no checkpoint was saved yet"),
        ("measuring experts", "long.yaml", 12, "no checkpoint was saved yet"),
        ("computing the reference", "dpo.yaml", 12, "no checkpoint was saved yet"),
        ("training", "long.yaml", 12, "no checkpoint was saved yet"),
        ("evaluating", "short.yaml", 4, "checkpoint-"),
        ("saving a checkpoint", "short.yaml", 4, "no checkpoint was saved yet"),
        ("saving the adapter", "short.yaml", 4, "checkpoint-2"),
    ],
)
def test_memory_that_ends_in_a_phase(
    where: str, recipe: str, mib: int, saved: str, workspace: Path, tmp_path: Path
) -> None:
    run = FORK.Process(target=limited_run, args=(workspace, recipe, tmp_path / "run", where, mib))
    run.start()
    run.join(timeout=60)
    run.kill()
    output = (tmp_path / "run.log").read_text()
    assert run.exitcode == 1, output
    assert f"out of memory while {where}" in output, output
    assert "Traceback" not in output, output
    assert saved in output
    assert "(ulimit -d), which counts addresses: " in output
