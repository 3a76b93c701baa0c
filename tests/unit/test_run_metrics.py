"""`metrics.jsonl` and the loss curve."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from transformers import TrainerControl, TrainerState, TrainingArguments

from finetune.errors import RunError
from finetune.run import MetricsCallback, draw_loss_curve, read_metrics

ARGUMENTS = TrainingArguments(output_dir="unused", report_to="none", use_cpu=True)


def log(callback: MetricsCallback, step: int, main: bool = True, **logs: Any) -> None:
    state = TrainerState(global_step=step, epoch=step / 10, is_world_process_zero=main)
    callback.on_log(ARGUMENTS, state, TrainerControl(), logs=logs)


def resume(callback: MetricsCallback, step: int) -> None:
    callback.on_train_begin(ARGUMENTS, TrainerState(global_step=step), TrainerControl())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_each_log_event_is_one_line_unrounded(path: Path) -> None:
    callback = MetricsCallback(path)
    log(callback, 1, loss=0.1 + 0.2, ce_loss=torch.tensor(1.5), tokens=np.int64(3))
    log(callback, 2, eval_loss=1 / 3)
    first, second = read_metrics(path)
    assert (first["loss"], first["ce_loss"], first["tokens"]) == (0.1 + 0.2, 1.5, 3)
    assert (second["step"], second["epoch"], second["eval_loss"]) == (2, 0.2, 1 / 3)
    times = read_metrics(path.with_name("times.jsonl"))
    assert times[1]["time"] >= times[0]["time"] > 0


def test_times_and_rates_stand_in_a_file_of_their_own(path: Path) -> None:
    log(MetricsCallback(path), 1, eval_loss=2.0, eval_runtime=3.0, eval_samples_per_second=4.0)
    assert read_metrics(path) == [{"eval_loss": 2.0, "step": 1, "epoch": 0.1}]
    (times,) = read_metrics(path.with_name("times.jsonl"))
    assert times.keys() == {"step", "eval_runtime", "eval_samples_per_second", "time"}


def test_a_value_that_is_not_finite_is_named_and_the_line_stays_json(path: Path) -> None:
    log(MetricsCallback(path), 1, loss=float("nan"), grad_norm=float("inf"))
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["loss"] == "nan"


def test_only_the_main_process_writes(path: Path) -> None:
    log(MetricsCallback(path), 1, main=False, loss=1.0)
    assert not path.exists()


def test_half_a_last_line_is_repaired_before_the_next_is_written(path: Path) -> None:
    log(MetricsCallback(path), 1, loss=2.0)
    with path.open("a") as handle:
        handle.write('{"loss": 1.')
    assert [line["step"] for line in read_metrics(path)] == [1]
    log(MetricsCallback(path), 2, loss=1.0)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def test_a_resumed_run_reads_as_if_it_had_not_been_interrupted(path: Path) -> None:
    before = MetricsCallback(path)
    for step in (1, 2, 3):
        log(before, step, loss=float(step))
    log(before, 2, train_loss=1.5)
    after = MetricsCallback(path)
    resume(after, step=2)
    for step in (3, 4):
        log(after, step, loss=float(step))
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1.0}'])
def test_a_foreign_line_is_an_error_with_its_number(path: Path, line: str) -> None:
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(RunError) as error:
        read_metrics(path)
    assert str(error.value) == (
        f"{path}:2: not a line that a run has written; got {line!r}; "
        "continue the run, which keeps a copy and the other lines, or remove the line"
    )


@pytest.mark.parametrize(
    ("logs", "panels"),
    [
        ({"loss": 2.0}, 1),
        ({"loss": 2.1, "ce_loss": 2.0, "balance_loss": 1.2}, 2),
        ({"loss": 0.7, "dpo_loss": 0.6, "rewards/margins": 0.1, "rewards/accuracies": 0.5, "balance_loss": 1.2}, 4),
    ],
)
def test_the_curve_has_a_panel_for_each_term(path: Path, logs: dict[str, Any], panels: int) -> None:
    callback = MetricsCallback(path)
    for step in (1, 2, 3):
        log(callback, step, **logs)
    log(callback, 3, eval_loss=1.9)
    picture = path.with_name("loss_curve.png")
    assert draw_loss_curve(path, picture)
    height, width = imread(picture).shape[:2]
    assert (height, width) == (420 * panels, 960)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["loss_curve.png", "metrics.jsonl", "times.jsonl"]


def test_a_run_too_short_to_log_a_loss_has_no_curve(path: Path) -> None:
    log(MetricsCallback(path), 1, train_loss=3.0)
    assert not draw_loss_curve(path, path.with_name("loss_curve.png"))
    assert not path.with_name("loss_curve.png").exists()


def test_a_continued_run_keeps_a_copy_of_a_damaged_file_and_uses_its_other_lines(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bad disk, or another program: the checkpoints are whole all the same."""
    before = MetricsCallback(path)
    for step in (1, 2, 3):
        log(before, step, loss=float(step))
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"step": 2', b"\xdc\xff"))
    resume(MetricsCallback(path), step=3)
    assert [line["step"] for line in read_metrics(path)] == [1, 3]
    copy = path.parent / "set-aside" / "metrics.jsonl.0"
    assert b"\xdc\xff" in copy.read_bytes()
    assert capsys.readouterr().out == (
        f"{path}:2: not a line that a run has written; the file is kept as {copy}, the rest is used\n"
    )
