"""`lora_dropout` through the real launcher: the same elements are dropped however a step is cut and divided."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from finetune.recipe import load_recipe
from finetune.run import read_metrics
from finetune.train import train as train_here
from tests.end_to_end.test_train_processes import TWO_PROCESSES
from tests.end_to_end.workspaces import write_workspace
from tests.families import save_tiny

STEPS = 6  # the fifth is the end of an epoch of 34 rows: two rows


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2-MoE, whose shared experts are linear layers, with dropout on everything but the router."""
    folder = tmp_path_factory.mktemp("workspace")
    save_tiny("qwen2_moe", folder / "model")
    write_workspace(
        folder,
        output_dir="run",
        model={"name_or_path": "model", "load_in_4bit": True, "dtype": "float32"},
        lora={"targets": ["attention", "experts", "shared_experts"], "r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        router={"router_aux_loss_coef": 0.1},
        data={"train": {"path": "rows.jsonl", "format": "prompt_completion"}, "max_length": 128},
        training={
            "max_steps": STEPS,
            "learning_rate": 0.01,
            "global_batch_size": 8,
            "per_device_train_batch_size": 4,
            "save_steps": 2,
        },
        save={"keep": STEPS},
    )
    return folder


def train_two(workspace: Path, output_dir: str, *overrides: str) -> tuple[str, list[dict[str, Any]]]:
    """What two processes say, and the run's lines."""
    command = [*TWO_PROCESSES, "-m", "finetune.train", "recipe.yaml", f"output_dir={output_dir}", *overrides]
    done = subprocess.run(command, cwd=workspace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 processes on 1 machine, cpu, DDP" in done.stdout.splitlines()
    return done.stdout, read_metrics(workspace / output_dir / "metrics.jsonl")


def train_one(workspace: Path, output_dir: str, *overrides: str) -> list[dict[str, Any]]:
    """The run's lines, trained in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        train_here(load_recipe("recipe.yaml", [f"output_dir={output_dir}", *overrides]), [])
    return read_metrics(workspace / output_dir / "metrics.jsonl")


@pytest.fixture(scope="module")
def one(workspace: Path) -> list[dict[str, Any]]:
    """One process with micro-batches of 4 + 4."""
    return train_one(workspace, "one")


def go_back_to(run: Path, step: int) -> None:
    """Leave what a run killed after `step` leaves."""
    shutil.rmtree(run / "adapter")
    for checkpoint in run.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)


def assert_steps(lines: list[dict[str, Any]], wanted: list[dict[str, Any]], precision: float) -> None:
    """The same loss and gradient norm in all steps."""
    ours, theirs = ([line for line in each if "grad_norm" in line] for each in (lines, wanted))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, STEPS + 1))
    for line, other in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "num_tokens"):
            assert line[key] == pytest.approx(other[key], abs=precision), (key, line["step"])


@pytest.mark.slow
def test_a_run_continues_on_two_processes_and_on_one_again(workspace: Path, one: list[dict[str, Any]]) -> None:
    """One process to step 2, two to step 4, one with a single micro-batch of 8 to the end."""
    run = workspace / "moved"
    shutil.copytree(workspace / "one", run)
    go_back_to(run, 2)
    output, two = train_two(workspace, "moved")
    assert "the run in moved continues from checkpoint-2" in output
    assert_steps(two, one, 0)  # the same micro-batches
    go_back_to(run, 4)
    assert_steps(train_one(workspace, "moved", "training.per_device_train_batch_size=8"), one, 1e-5)


@pytest.mark.faults
def test_two_processes_with_two_micro_batches_each(workspace: Path, one: list[dict[str, Any]]) -> None:
    _, lines = train_two(workspace, "four", "training.per_device_train_batch_size=2")
    assert_steps(lines, one, 1e-5)
