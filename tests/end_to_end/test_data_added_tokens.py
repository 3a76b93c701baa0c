"""A template whose marks the base lacks: train, resume, two processes, merge."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.merge import merge
from finetune.recipe import load_recipe
from finetune.run import read_metrics
from finetune.train import train
from tests.end_to_end.workspaces import write_workspace
from tests.support import save_tiny_mixtral
from tests.unit.added_tokens import BASES, KNOWN, MARKS, NEW, TURNS

TWO_PROCESSES = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
MODULES = ("model.embed_tokens", "lm_head")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps on 34 rows, with a checkpoint after two."""
    folder = tmp_path_factory.mktemp("workspace")
    save_tiny_mixtral(folder / "model", **BASES["untied"])
    (folder / "turns.jinja").write_text(TURNS, encoding="utf-8")
    model = {"name_or_path": "model", "load_in_4bit": True, "dtype": "float32"}
    sections: dict[str, Any] = {
        "output_dir": "run",
        "model": {**model, "added_tokens": MARKS, "eos_token": MARKS[1]},
        "lora": {"targets": ["attention", "experts"], "r": 4, "lora_alpha": 8},
        "router": {"router_aux_loss_coef": 0.1},
        "data": {
            "train": {"path": "rows.jsonl", "format": "prompt_completion"},
            "max_length": 128,
            "chat_template": "turns.jinja",
        },
    }
    write_workspace(folder, **sections)
    return folder


def run(workspace: Path, output_dir: str, *overrides: str) -> Path:
    """Train in this process; returns the adapter's folder."""
    before = Path.cwd()
    os.chdir(workspace)
    try:
        train(load_recipe(Path("recipe.yaml"), [f"output_dir={output_dir}", *overrides]), ["test"])
    finally:
        os.chdir(before)
    return workspace / output_dir / "adapter"


@pytest.fixture(scope="module")
def one(workspace: Path) -> Path:
    """The adapter of the uninterrupted run of one process."""
    return run(workspace, "one")


def weights(folder: Path, name: str = "adapter_model") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / f"{name}.safetensors")
    return found


def rows(adapter: Path) -> dict[str, torch.Tensor]:
    """The trained rows by the matrix on disk that they belong to."""
    held = weights(adapter)
    return {f"{name}.weight": held[f"base_model.model.{name}.token_adapter.trainable_tokens_delta"] for name in MODULES}


def assert_same(adapter: Path, other: Path) -> None:
    ours, theirs = weights(adapter), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() < 1e-4, name


def test_the_run_says_what_it_trains_and_the_merge_moves_nothing_else(workspace: Path, one: Path) -> None:
    parts = {part["part"]: part for part in json.loads((workspace / "one" / "audit.json").read_text())["parts"]}
    trained = {name: (part["rows"], part["trained"]) for name, part in parts.items() if not part["adapted"]}
    assert {name: counts for name, counts in trained.items() if any(counts)} == {
        "embeddings": (2, 2 * 64),
        "head": (2, 2 * 64),
    }
    report = merge(one, workspace / "merged", base=workspace / "model", show_progress=False)
    assert (report.added_tokens, report.proof.changed) == (2, report.targeted)
    merged, base = weights(workspace / "merged", "model"), weights(workspace / "model", "model")
    for key, trained_rows in rows(one).items():
        assert torch.equal(merged[key][:KNOWN], base[key]), "no row of the base has moved"
        assert torch.equal(merged[key][NEW], trained_rows)
        assert ((trained_rows - base[key].mean(0)).abs().amax(1) > 1e-3).all(), "and the new ones have"


def test_a_run_that_was_cut_off_continues_as_if_it_had_not_been(workspace: Path, one: Path) -> None:
    cut = shutil.copytree(workspace / "one", workspace / "cut")
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(cut / name)
    held = {name: tuple(tensor.shape) for name, tensor in weights(cut / "checkpoint-2").items()}
    assert {shape for name, shape in held.items() if ".lora_" not in name} == {(2, 64)}, "not the whole embedding"
    assert_same(run(workspace, "cut"), one)


def test_weight_decay_pulls_no_row_to_zero(workspace: Path) -> None:
    """The learning rate alone moves nothing visible; the decay takes a tenth of what it reaches."""
    overrides = ("training.learning_rate=1e-7", "training.weight_decay=1000000", "training.max_steps=1")
    adapter = run(workspace, "decayed", *overrides)
    base = weights(workspace / "model", "model")
    for key, decayed_rows in rows(adapter).items():
        mean = base[key].mean(0)
        torch.testing.assert_close(decayed_rows, torch.stack([mean, mean]), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(workspace: Path, one: Path) -> None:
    command = [*TWO_PROCESSES, "-m", "finetune.train", "recipe.yaml", "output_dir=two"]
    done = subprocess.run(command, cwd=workspace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [
        [line["loss"] for line in read_metrics(workspace / name / "metrics.jsonl") if "loss" in line]
        for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)
    assert_same(workspace / "two" / "adapter", one)
