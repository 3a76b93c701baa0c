"""Runs whose model is sharded by FSDP2 take the steps of runs that hold it whole, and continue on other numbers."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from finetune.run import read_metrics
from tests.end_to_end.workspaces import write_workspace
from tests.equivalence.dpo_runs import write_pairs
from tests.equivalence.ranks import free_port
from tests.faults.harness import Commands, wait_for
from tests.support import save_tiny_mixtral

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral of 4 experts, 34 rows, and 10 steps of 12 rows: two epochs end within them, and one after."""
    folder = tmp_path_factory.mktemp("sharded")
    save_tiny_mixtral(folder / "base")
    source = {"path": "rows.jsonl", "format": "prompt_completion"}
    write_workspace(
        folder,
        output_dir="run",
        model={"name_or_path": "base", "load_in_4bit": True, "dtype": "float32"},
        lora={"targets": ["attention", "experts"], "r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        router={"router_aux_loss_coef": 0.1},
        data={"train": dict(source), "eval": dict(source), "max_length": 128},
        training={
            "max_steps": 10,
            "learning_rate": 0.001,
            "lr_scheduler_type": "constant",
            "global_batch_size": 12,
            "per_device_train_batch_size": 2,
            "save_steps": 4,
            "logging_steps": 1,
        },
        save={"keep": 5},
    )
    write_pairs(folder / "pairs.jsonl", 34)
    return folder


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    started = Commands(tmp_path_factory.mktemp("commands"))
    yield started
    started.close()


def train(
    commands: Commands, folder: Path, count: int, output: str, *words: str, sharded: bool = True, **names: str
) -> Path:
    """A run on so many processes; its folder. `names`: more of the environment."""
    together = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **names}
    if count > 1 and sharded:
        together |= SHARDED
    arguments = ("train", "recipe.yaml", f"output_dir={output}", *words)
    environments = [
        {**together, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {} for rank in range(count)
    ]
    ended = [each.wait() for each in [commands.start(folder, *arguments, **each) for each in environments]]
    assert [each.code for each in ended] == [0] * count, "\n".join(each.output for each in ended)
    if count > 1:
        shard = names.get("PARALLELISM_CONFIG_DP_SHARD_SIZE", count)
        says = f"{count} processes on 1 machine, cpu, " + (f"FSDP2 over {shard}" if sharded else "DDP")
        assert says in ended[0].output
    return folder / output


def assert_same(run: Path, other: Path, within: float = 1e-6) -> None:
    """Every figure of every line, and the adapter."""
    lines, others = read_metrics(run / "metrics.jsonl"), read_metrics(other / "metrics.jsonl")
    assert [line.keys() for line in lines] == [line.keys() for line in others]
    for line, theirs in zip(lines, others, strict=True):
        for key, value in line.items():
            if key == "total_flos" and within > 1e-6:
                continue  # with padding, which another cut has more or less of
            assert value == pytest.approx(theirs[key], abs=2 * within, rel=2 * within), (key, line["step"])
    adapter, theirs = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (run, other))
    assert adapter.keys() == theirs.keys()
    worst = {name: (tensor - theirs[name]).abs().max().item() for name, tensor in adapter.items()}
    assert max(worst.values()) <= 5 * within, worst


@pytest.fixture(scope="module")
def two(workspace: Path) -> Path:
    """Two processes, launched with the shipped file."""
    file = str(ROOT / "accelerate_configs" / "fsdp2.yaml")
    launch = [str(BIN / "accelerate"), "launch", "--config_file", file, "--num_processes", "2"]
    command = [*launch, "-m", "finetune.train", "recipe.yaml", "output_dir=two"]
    done = subprocess.run(command, cwd=workspace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 processes on 1 machine, cpu, FSDP2 over 2" in done.stdout
    assert "MiB here" in done.stdout
    return workspace / "two"


@pytest.fixture(scope="module")
def three(commands: Commands, workspace: Path) -> Path:
    return train(commands, workspace, 3, "three")


def test_two_processes_take_the_steps_of_two_that_hold_the_model_whole(
    commands: Commands, workspace: Path, two: Path
) -> None:
    assert_same(two, train(commands, workspace, 2, "whole-two", sharded=False))
    audit = json.loads((two / "audit.json").read_text())
    experts = next(part for part in audit["parts"] if part["part"] == "experts")
    assert experts["stored_as"] == {"nf4": 4}
    assert experts["local_bytes"] <= experts["bytes"] / 2 * 1.01 + 64


@pytest.mark.faults
def test_three_processes_over_four_experts(commands: Commands, workspace: Path, three: Path) -> None:
    assert_same(three, train(commands, workspace, 3, "whole-three", sharded=False))


def test_a_run_continues_on_three_processes_and_then_on_one(commands: Commands, workspace: Path, two: Path) -> None:
    shutil.copytree(two, workspace / "moved")
    for step, count in ((4, 3), (8, 1)):
        shutil.rmtree(workspace / "moved" / "adapter")
        for folder in (workspace / "moved").glob("checkpoint-*"):
            if int(folder.name.partition("-")[2]) > step:
                shutil.rmtree(folder)
        moved = train(commands, workspace, count, "moved")
    assert_same(moved, two, within=3e-6)


def test_preference_pairs_whose_reference_has_nine_batches(commands: Commands, workspace: Path) -> None:
    source: Any = "{path: pairs.jsonl, format: preference}"
    words = (
        *("method={kind: dpo, beta: 0.5, reference: precomputed}", f"data.train={source}", f"data.eval={source}"),
        *("training.per_device_train_batch_size=4", "training.global_batch_size=8", "training.max_steps=6"),
    )
    whole = train(commands, workspace, 2, "pairs-whole", *words, sharded=False)
    assert_same(train(commands, workspace, 2, "pairs", *words), whole, within=1e-5)


@pytest.mark.faults
def test_quantised_optimizer_states_continue_on_as_many_processes_only(commands: Commands, workspace: Path) -> None:
    words = ("training.optim=adamw_8bit", "training.max_steps=6")
    run = train(commands, workspace, 2, "8bit", *words)
    whole = load_file(run / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoint-6")
    alone = commands.run(workspace, "train", "recipe.yaml", "output_dir=8bit", *words)
    assert alone.code == 1
    assert (
        "training.optim: a bitsandbytes optimizer's states are quantised in blocks of each process's part, of 2 parts; "
        "got 1 parts; continue on 2 with the launcher file of the first start, or start anew with adamw_torch"
    ) in alone.output
    again = load_file(train(commands, workspace, 2, "8bit", *words) / "adapter" / "adapter_model.safetensors")
    assert all((again[name] == tensor).all() for name, tensor in whole.items())


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_an_evaluation_that_was_cut_short_is_made_once_and_the_training_goes_on(
    commands: Commands, workspace: Path, sharded: bool
) -> None:
    """Two processes continue what a signal has ended on one, where an evaluation was due: its model was not wrapped."""
    words = ("training.eval_steps=1", "training.save_steps=1", "training.max_steps=6")
    if not (whole := workspace / "evaluated").exists():
        train(commands, workspace, 1, "evaluated", *words)
    cut = f"cut-{sharded}"
    running = commands.start(workspace, "train", "recipe.yaml", f"output_dir={cut}", *words)
    assert wait_for(lambda: (workspace / cut / "checkpoint-2").exists(), running)
    running.send(signal.SIGTERM)
    assert running.wait().code == 0
    assert not (workspace / cut / "adapter").exists()
    assert_same(train(commands, workspace, 2, cut, *words, sharded=sharded), whole, within=2e-6)


@pytest.mark.faults
def test_two_groups_of_two_processes(commands: Commands, workspace: Path, two: Path) -> None:
    """HSDP: each group holds a model, and the gradients are those of all four."""
    sizes = {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}
    groups = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "FINETUNE_CHECK_FORWARDS": "1", **sizes}
    four = train(commands, workspace, 4, "four", "training.per_device_train_batch_size=1", sharded=True, **groups)
    assert_same(four, two, within=1e-5)
