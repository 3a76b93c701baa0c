"""DPO as a user runs it: from an SFT adapter, through the launchers, merged and proven."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.errors import WeightsError
from finetune.merge import merge
from finetune.recipe import load_recipe
from finetune.run import read_metrics
from finetune.train import train
from tests.end_to_end.workspaces import written
from tests.equivalence.dpo_runs import write_pairs
from tests.support import save_tiny_mixtral

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CPU = ["--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml")]
ONE_PROCESS = [str(BIN / "accelerate"), "launch", *CPU]
TWO_PROCESSES = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]
ON_TWO = "2 processes on 1 machine, cpu, DDP"
PAIRS = 34  # not a multiple of any batch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral, an SFT run on it, and a DPO recipe of two epochs that starts from its adapter."""
    folder = tmp_path_factory.mktemp("workspace")
    save_tiny_mixtral(folder / "model")
    rows = [{"prompt": "light " * (1 + i % 7), "completion": "on " * (1 + i % 3)} for i in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_pairs(folder / "pairs.jsonl", PAIRS)
    sft: dict[str, Any] = {
        "output_dir": "sft",
        "model": {"name_or_path": "model", "load_in_4bit": True, "dtype": "float32"},
        "lora": {"targets": ["attention", "experts", "router"], "r": 4, "lora_alpha": 8},
        "router": {"router_aux_loss_coef": 0.1},
        "method": {"kind": "sft"},
        "data": {"train": {"path": "rows.jsonl", "format": "prompt_completion"}, "max_length": 128},
        "training": {"max_steps": 2, "learning_rate": 0.02, "global_batch_size": 8, "gradient_checkpointing": "full"},
        "logging": {"report_to": "none"},
    }
    pairs = {"path": "pairs.jsonl", "format": "preference"}
    dpo = {
        **sft,
        "output_dir": "dpo",
        "model": {**sft["model"], "adapter": "sft/adapter"},
        "method": {"kind": "dpo", "beta": 0.5, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
        "data": {"train": pairs, "eval": dict(pairs), "max_length": 128},
        "training": {**sft["training"], "max_steps": 10, "per_device_train_batch_size": 4, "eval_steps": 5},
    }
    for name, recipe in (("sft", sft), ("dpo", dpo)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    within(folder, lambda: train(load_recipe("sft.yaml"), []))
    return folder


def within(folder: Path, work: Callable[[], Any]) -> Any:
    """Recipes name paths relative to the working directory."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        return work()
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def one(workspace: Path) -> Path:
    """The uninterrupted run of one process."""
    run(workspace, ONE_PROCESS, "one", first_line="1 process on 1 machine, cpu")
    return workspace / "one"


def command(launcher: list[str], output_dir: str, *overrides: str) -> list[str]:
    return [*launcher, "-m", "finetune.train", "dpo.yaml", f"output_dir={output_dir}", *overrides]


def run(workspace: Path, launcher: list[str], output_dir: str, *overrides: str, first_line: str) -> None:
    words = command(launcher, output_dir, *overrides)
    done = subprocess.run(words, cwd=workspace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert first_line in done.stdout.splitlines()


def assert_same(run: Path, one: Path) -> None:
    """Every figure and every byte of the adapter; processes write their own parts of the reference and checkpoints."""
    lines = read_metrics(run / "metrics.jsonl")
    assert lines == read_metrics(one / "metrics.jsonl")
    assert any("eval_rewards/margins" in line for line in lines)
    ours, theirs = written(run), written(one)
    assert ours["adapter/adapter_model.safetensors"] == theirs["adapter/adapter_model.safetensors"]


def reference_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for path in run.glob("reference/train.*.jsonl") for line in path.open()]
    return sorted(lines, key=lambda line: int(line["pair"]))


def test_the_run_leaves_what_an_sft_run_leaves(one: Path) -> None:
    lines = [line for line in read_metrics(one / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert lines[3]["rewards/margins"] > 0.05
    assert {"router/same_as_reference", "router/same_in_both_answers", "balance_loss"} <= lines[0].keys()
    names = {path.name for path in one.iterdir()}
    assert {"adapter", "audit.json", "provenance.json", "recipe.yaml", "reference", "loss_curve.png"} <= names
    assert len(reference_of(one)) == PAIRS
    record = json.loads((one / "adapter" / "finetune.json").read_text())
    assert record["adapter"]["name_or_path"] == "sft/adapter"
    assert record["recipe"]["method"]["kind"] == "dpo"


def test_two_processes_take_the_steps_of_one(workspace: Path, one: Path) -> None:
    """Over two epoch ends, where 2 pairs are left; the reference has 9 batches, 5 on one process and 4 on the other."""
    run(workspace, TWO_PROCESSES, "two", first_line=ON_TWO)
    assert_same(workspace / "two", one)
    assert [line["epoch"] for line in read_metrics(one / "metrics.jsonl") if "loss" in line][4::5] == [1, 2]
    shares = [path.read_text().count("\n") for path in sorted((workspace / "two" / "reference").glob("train.*.jsonl"))]
    assert shares == [18, 16]
    assert reference_of(workspace / "two") == reference_of(one)


def test_packed_pairs_on_two_processes_are_those_of_one(workspace: Path) -> None:
    """The processes have different numbers of pairs at a time, and at the end of an epoch one has none."""
    changes = ["data.packing=true", "training.global_batch_size=4", "training.per_device_train_batch_size=2"]
    overrides = ["output_dir=packed", *changes, "training.max_steps=4", "training.eval_steps=null"]
    within(workspace, lambda: train(load_recipe("dpo.yaml", overrides), []))
    run(workspace, TWO_PROCESSES, "packed-two", *overrides[1:], first_line=ON_TWO)
    assert_same(workspace / "packed-two", workspace / "packed")


def test_the_merge_is_proven_on_the_same_base(workspace: Path, one: Path) -> None:
    within(workspace, lambda: merge(Path("one/adapter"), Path("merged")))
    report = json.loads((workspace / "merged" / "merge-report.json").read_text())
    assert report
    assert (workspace / "merged" / "config.json").exists()


def test_a_base_that_was_changed_behind_an_adapter_is_refused(workspace: Path, one: Path, tmp_path: Path) -> None:
    """Another one, under the same name."""
    shutil.copytree(workspace / "sft", tmp_path / "sft")
    for name in ("dpo.yaml", "pairs.jsonl"):
        shutil.copy(workspace / name, tmp_path / name)
    save_tiny_mixtral(tmp_path / "model", seed=1)
    with pytest.raises(WeightsError, match="was made on another base, model with other weights; got model; name that"):
        within(tmp_path, lambda: train(load_recipe("dpo.yaml"), []))
