"""Training through the real launchers: two processes give what one gives."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.recipe import load_recipe
from finetune.run import read_metrics
from finetune.train import train as train_here
from tests.end_to_end.workspaces import differing, write_workspace, written
from tests.families import save_tiny

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CPU = ["--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml")]
ONE_PROCESS = [str(BIN / "accelerate"), "launch", *CPU]
TWO_PROCESSES = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DeepSeek-V3, 34 rows (not a multiple of any batch), and a recipe of two epochs.

    Routers are adapted and balanced in all three ways at once: by the loss, the z-loss and their correction biases.
    """
    folder = tmp_path_factory.mktemp("workspace")
    save_tiny("deepseek_v3", folder / "model")
    source = {"path": "rows.jsonl", "format": "prompt_completion"}
    sections: dict[str, Any] = {
        "output_dir": "run",
        "model": {"name_or_path": "model", "load_in_4bit": True, "dtype": "float32"},
        "lora": {"targets": ["attention", "experts", "router"], "r": 4, "lora_alpha": 8},
        "router": {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01, "bias_update_rate": 0.02},
        "data": {"train": dict(source), "eval": dict(source), "max_length": 128},
        "training": {
            "max_steps": 10,
            "learning_rate": 0.01,
            "global_batch_size": 8,
            "per_device_train_batch_size": 4,
            "eval_steps": 5,
            "save_steps": 8,
        },
    }
    write_workspace(folder, **sections)
    return folder


def train(workspace: Path, launcher: list[str], output_dir: str, first_line: str) -> list[dict[str, Any]]:
    """Run to the end and return the logged lines; `first_line` says how many processes there are."""
    command = [*launcher, "-m", "finetune.train", "recipe.yaml", f"output_dir={output_dir}"]
    done = subprocess.run(command, cwd=workspace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert first_line in done.stdout.splitlines()
    return read_metrics(workspace / output_dir / "metrics.jsonl")


@pytest.fixture(scope="module")
def one(workspace: Path) -> list[dict[str, Any]]:
    """The lines of the run of one process. Autocast, which the launcher asks for, changes nothing."""
    launcher = [*ONE_PROCESS, "--mixed_precision", "bf16", "--dynamo_backend", "inductor"]
    return train(workspace, launcher, "one", "1 process on 1 machine, cpu")


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(workspace: Path, one: list[dict[str, Any]]) -> None:
    """Over two epoch ends, where 2 rows are left: every figure and every byte of the adapter, its biases and the load
    by layer and expert."""
    lines = train(workspace, TWO_PROCESSES, "two", "2 processes on 1 machine, cpu, DDP")
    assert lines == one
    logged = [line for line in one if "loss" in line]
    assert [(line["step"], line["epoch"]) for line in logged] == [(step, step / 5) for step in range(1, 11)]
    assert logged[9]["num_tokens"] == 2 * logged[4]["num_tokens"], "each row once in each epoch"
    assert [line["step"] for line in one if "eval_loss" in line] == [5, 10]
    different = differing(workspace / "two", workspace / "one")
    assert [name for name in different if not name.startswith("checkpoint-")] == []
    assert {"adapter/adapter_model.safetensors", "adapter/router_bias.safetensors"} <= written(workspace / "two").keys()
    loads = read_metrics(workspace / "two" / "router_load.jsonl")
    assert [line["layers"] for line in loads] == [[1, 2]] * 10, "the first layer of the model is dense"
    assert (workspace / "two" / "router_load.png").stat().st_size > 1000


def test_two_runs_of_a_recipe_write_the_same_bytes(
    workspace: Path, one: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapter, checkpoints, metrics, router load, audit, cards and pictures; times stand in files of their own."""
    monkeypatch.chdir(workspace)
    train_here(load_recipe("recipe.yaml", ["output_dir=again"]), [])
    assert differing(workspace / "again", workspace / "one") == []
    names = written(workspace / "one").keys()
    assert {"metrics.jsonl", "checkpoint-8/training_state.safetensors", "adapter/SHA256SUMS"} <= names
    assert not any(name.endswith((".pt", ".pth", ".bin")) for name in names)
    cards = {name: text for name, text in written(workspace / "one").items() if name.endswith("README.md")}
    assert cards.keys() == {f"{folder}/README.md" for folder in ("adapter", "checkpoint-8", "checkpoint-10")}
    assert all(b"moe-finetune" in text and b"fine-tuned version of" not in text for text in cards.values())


@pytest.mark.slow
def test_an_error_of_every_process_is_said_once_and_last(workspace: Path) -> None:
    (workspace / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "use_cpu": True}
    config |= {"num_machines": 1, "machine_rank": 0, "num_processes": 2, "mixed_precision": "no", "gpu_ids": "all"}
    (workspace / "two.yaml").write_text(json.dumps(config))
    command = [str(BIN / "finetune"), "train", "--config_file", "two.yaml", "recipe.yaml", "output_dir=bad"]
    done = subprocess.run([*command, "data.train.path=bad.jsonl"], cwd=workspace, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("bad.jsonl:2: completion: is missing")
    assert done.stderr.count("bad.jsonl:2") == 1
    assert "Traceback" not in done.stderr
    assert not (workspace / "bad" / "adapter").exists()
