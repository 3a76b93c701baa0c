"""What a user does with a run on purpose: go back, go on longer, start anew, stop early."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Commands
from tests.faults.runs import SECTIONS, Run, Undisturbed, make_run


@pytest.fixture
def finished(sft: Undisturbed, tmp_path: Path) -> Run:
    """A copy of the undisturbed run."""
    run = sft.run.copied_to(tmp_path)
    shutil.copytree(sft.run.path, run.path)
    return run


def change(run: Run, key: str, value: Any) -> None:
    """Write another value of a key of `training` into the recipe."""
    path = run.folder / "recipe.yaml"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(f"  {key}: {value}" if line.startswith(f"  {key}:") else line for line in lines) + "\n")


def metrics(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.faults
def test_a_run_goes_back_to_a_checkpoint_and_ends_the_same(sft: Undisturbed, finished: Run) -> None:
    output = finished.finish("training.resume=run/checkpoint-4").output
    assert "later checkpoints are kept in run/set-aside: checkpoint-6" in output
    assert "the finished adapter is kept as run/adapter.1" in output
    shutil.rmtree(finished.path / "adapter.1")
    files = {name: content for name, content in finished.files().items() if name != "recipe.yaml"}
    assert files == {name: content for name, content in sft.files.items() if name != "recipe.yaml"}


@pytest.mark.faults
def test_a_run_starts_anew_and_keeps_the_earlier_one(sft: Undisturbed, finished: Run) -> None:
    assert "is kept as" in finished.finish("training.resume=never").output
    assert (finished.folder / "run.1" / "adapter").is_dir()
    assert finished.files()["metrics.jsonl"] == sft.files["metrics.jsonl"]


@pytest.mark.faults
def test_a_longer_run_and_another_rate_are_refused_until_they_are_allowed_and_then_used(finished: Run) -> None:
    change(finished, "max_steps", 8)
    change(finished, "learning_rate", 0.003)
    ended = finished.start().wait()
    assert ended.code == 1
    assert [line.partition(":")[0] for line in ended.output.splitlines() if "--allow-change" in line] == [
        "training.max_steps",
        "training.learning_rate",
    ]
    allow = ("--allow-change=training.max_steps", "--allow-change=training.learning_rate")
    output = finished.finish(*allow).output
    assert "training.max_steps: 6 became 8, which --allow-change allows" in output
    rates = {line["step"]: line["learning_rate"] for line in metrics(finished) if "loss" in line}
    assert list(rates) == [1, 2, 3, 4, 5, 6, 7, 8]
    # A cosine over 8 steps from 0.003, at its last quarter.
    assert rates[7] == pytest.approx(0.003 * 0.5 * (1 + 0.7071067811865475 * -1), rel=1e-6)
    assert rates[8] < rates[7]
    assert "is finished" in finished.finish().output
    assert "is finished" in finished.finish(*allow).output


def early(commands: Commands, folder: Path) -> Run:
    """With a rate too small to change a loss: no evaluation is better than the first one."""
    training = {**SECTIONS["training"], "max_steps": 12, "learning_rate": 1e-30, "lr_scheduler_type": "constant"}
    training |= {"eval_steps": 1, "save_steps": 12, "early_stopping_patience": 2}
    return make_run(commands, folder, training=training, save={"keep": 1})


@pytest.mark.faults
def test_early_stopping_keeps_the_best_checkpoint_and_a_lost_adapter_is_saved_again(
    commands: Commands, tmp_path: Path
) -> None:
    run = early(commands, tmp_path)
    output = run.finish().output
    assert [line["step"] for line in metrics(run) if "eval_loss" in line] == [1, 2, 3]
    assert "early stopping at step 3: the best evaluation is of step 1" in output
    assert run.checkpoints() == [1, 3]
    before = run.files()
    assert "is finished" in run.finish().output
    shutil.rmtree(run.path / "adapter")
    assert "continues from checkpoint-3" in run.finish().output
    assert run.files() == before


@pytest.mark.faults
def test_a_checkpoint_between_two_log_lines_continues_the_sums_of_the_line(commands: Commands, tmp_path: Path) -> None:
    training = {**SECTIONS["training"], "save_steps": 3, "eval_steps": 3, "logging_steps": 4}
    run = make_run(commands, tmp_path, training=training)
    run.finish()
    before = run.files()
    for name in ("adapter", "checkpoint-6"):
        shutil.rmtree(run.path / name)
    run.finish()
    assert run.files() == before
