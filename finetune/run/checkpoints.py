"""The folders `checkpoint-N` of a run: found, verified, set aside, removed.

A checkpoint is written beside its name and renamed, with a list of the SHA-256 sums of all of its files, so one that
has its name is whole unless something has changed it since. It is verified before a run continues from it.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.checkpoint import SUMS_FILE, verify_sums
from finetune.errors import FinetuneError, Problem, RunError, WeightsError

STATE_FILE = "trainer_state.json"
IDENTITY_FILE = "identity.json"
TRAINING_FILES = ("training_state.safetensors", "training_state.json")
REQUIRED = (
    STATE_FILE,
    IDENTITY_FILE,
    *TRAINING_FILES,
    "adapter_model.safetensors",
    "adapter_config.json",
    "finetune.json",
)
SET_ASIDE = "set-aside"
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFT = re.compile(r"\.checkpoint-\d+\.(partial|lock|removed)|\.\.checkpoint-\d+\.new\.(partial|lock)")
_NEW = re.compile(r"\.(checkpoint-\d+)\.new")


def checkpoint_folder(run: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run / f"checkpoint-{step}"


def checkpoints(run: Path) -> dict[int, Path]:
    """The folders `checkpoint-N` by step, oldest first; not verified."""
    found = {int(match[1]): path for path in run.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    return {step: found[step] for step in sorted(found)}


def newest_step(run: Path) -> int | None:
    """The step of the newest checkpoint, None without one."""
    return max(checkpoints(run), default=None)


def check_whole(folder: Path) -> None:
    """Raise FinetuneError where a file is missing, differs from its sum, or was never listed."""
    do = "continue from another checkpoint of the run"
    listed = folder / SUMS_FILE
    if not listed.is_file():
        what = f"{SUMS_FILE} is missing: the checkpoint is not whole, or of an earlier version of this program"
        raise RunError(Problem(str(folder), what, do))
    try:
        verify_sums(folder)
    except WeightsError as error:  # taking a line out of the list, which it advises, would not help here
        raise RunError([replace(problem, do=do) for problem in error.problems]) from error
    names = {line.partition("  ")[2] for line in listed.read_text(encoding="utf-8").splitlines()}
    if missing := [name for name in REQUIRED if name not in names]:
        raise RunError(Problem(str(folder), f"{SUMS_FILE} does not list {', '.join(missing)}", do))


def whole_checkpoints(run: Path) -> Iterator[tuple[int, Path]]:
    """(step, folder) of the checkpoints that are whole, newest first; each is verified when its turn comes."""
    for step, folder in reversed(checkpoints(run).items()):
        try:
            check_whole(folder)
        except (FinetuneError, OSError):
            continue
        yield step, folder


def set_aside(run: Path, folder: Path) -> Path:
    """Move a checkpoint to `set-aside/` in the run folder, under a free name, which is returned."""
    place = run / SET_ASIDE
    place.mkdir(exist_ok=True)
    names = (folder.name if number == 0 else f"{folder.name}.{number}" for number in range(10_000))
    free = next(place / name for name in names if not (place / name).exists())
    folder.rename(free)
    return free


def remove_leftovers(run: Path) -> None:
    """Remove what a killed run left of a checkpoint or a file that it was writing or removing.

    Only with the run's lock.
    """
    for folder in (run, run / "reference"):
        for path in folder.glob(".tmp-*"):  # of finetune.files.write_atomically
            path.unlink()
    for path in run.glob(".*checkpoint-*"):
        if match := _NEW.fullmatch(path.name):
            replace_by(run / match[1], path)
        elif _LEFT.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def replacement(folder: Path) -> Path:
    """Where a checkpoint is written that takes the place of another one of the same step."""
    return folder.with_name(f".{folder.name}.new")


def replace_by(folder: Path, new: Path) -> None:
    """Let the whole checkpoint `new` take the place of `folder`; a kill leaves one of them, or `new` alone."""
    hidden = _hidden(folder)
    shutil.rmtree(hidden, ignore_errors=True)
    if folder.exists():
        folder.rename(hidden)
    new.rename(folder)
    shutil.rmtree(hidden, ignore_errors=True)


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.removed")


def remove_old(run: Path, keep: int, best: int | None) -> None:
    """Remove all checkpoints but the `keep` newest and that of the best step; renamed first, so none is left half."""
    steps = list(checkpoints(run))
    for step in steps[: max(len(steps) - keep, 0)]:
        if step != best:
            folder = checkpoint_folder(run, step)
            hidden = _hidden(folder)
            shutil.rmtree(hidden, ignore_errors=True)
            folder.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)


@dataclass(frozen=True)
class Best:
    """The best evaluation of a run: its step, and the value of `metric_for_best_model` (the loss, unless changed)."""

    step: int
    value: float


def best_of(folder: Path) -> Best | None:
    """The best evaluation up to a checkpoint, as its trainer's state has it; None without an evaluation."""
    state = read_trainer_state(folder)
    step, value = state.get("best_global_step"), state.get("best_metric")
    return Best(step, float(value)) if isinstance(step, int) and isinstance(value, int | float) else None


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """`trainer_state.json`; RunError where it is not one."""
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(state["global_step"], int) or not isinstance(state["max_steps"], int):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        what, do = "not the state of a trainer", "continue from another checkpoint of the run"
        raise RunError(Problem(str(path), what, do)) from None
    return dict(state)
