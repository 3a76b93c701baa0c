"""Saving off the training thread: errors reach the training, a full disk does not end it, and minutes are said."""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.errors import RunError
from finetune.methods.checkpointing import CheckpointSaver
from finetune.methods.run_trainer import _Flow


class Saver(CheckpointSaver):
    """Writes an empty folder, unless it is given an error to raise."""

    error: Exception | None = None

    def _write(self, snapshot: Any) -> None:
        if self.error is not None:
            raise self.error
        (self.run / f"checkpoint-{snapshot.step}").mkdir()


@pytest.fixture
def saver(tmp_path: Path) -> Saver:
    setup: Any = SimpleNamespace(run=SimpleNamespace(path=tmp_path))
    return Saver(setup, steps_between=50)


def save(saver: Saver, step: int, error: Exception | None = None) -> None:
    saver.error = error
    snapshot: Any = SimpleNamespace(step=step)
    saver.save(snapshot)


def test_a_full_disk_is_said_and_tried_again_after_a_tenth_of_the_steps(
    saver: Saver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(saver, 50)
    save(saver, 100, OSError(errno.ENOSPC, "No space left on device"))
    saver.wait()
    assert saver.retry_at == 105
    line = capsys.readouterr().out
    assert line.startswith(f"{tmp_path}/checkpoint-100: the disk is full")
    assert line.endswith(
        "the run goes on, its last whole checkpoint is of step 50, and it is tried again at step 105\n"
    )
    with pytest.raises(RunError, match="the checkpoint of step 100 could not be saved, its last whole checkpoint is"):
        saver.wait_or_raise()
    save(saver, 105)
    saver.wait_or_raise()
    assert saver.retry_at is None


def test_any_other_error_ends_the_training_and_not_only_its_thread(saver: Saver) -> None:
    save(saver, 50, ValueError("a mistake"))
    with pytest.raises(ValueError, match="a mistake"):
        saver.wait()


@pytest.mark.parametrize(
    ("seconds", "line"),
    [
        (6, "a checkpoint every 40 steps, about every 4.0 minutes\n"),
        (
            90,
            "a checkpoint every 40 steps, about every 60.0 minutes: a killed run loses as much; "
            "training.save_steps=20 would save twice an hour\n",
        ),
    ],
)
def test_the_first_steps_say_how_many_minutes_a_checkpoint_is_apart(
    seconds: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer: Any = SimpleNamespace(restore=lambda: None, agreed=lambda: 0)
    flow, state = _Flow(trainer), SimpleNamespace(global_step=10, save_steps=40, is_world_process_zero=True)
    clock = iter([0.0, 3.0 * seconds])
    monkeypatch.setattr("finetune.methods.run_trainer.time.monotonic", lambda: next(clock))
    flow.on_train_begin(None, state, None)
    for step in (11, 12, 13, 14):
        state.global_step = step
        flow.on_step_end(None, state, None)
    assert capsys.readouterr().out == line
