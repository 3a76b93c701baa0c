"""`metrics.jsonl`: one JSON object per log event, on disk before the next step starts."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.errors import Problem, RunError
from finetune.files import write_text


class MetricsCallback(TrainerCallback):  # type: ignore[misc]
    """Append what the trainer logs, unrounded, with `step`, `epoch` and `time` (seconds since 1970).

    Only the main process writes. A kill can leave an incomplete line; it is removed before the next one is written. A
    resumed run removes the steps after its checkpoint, because it repeats them: the file looks like that of an
    uninterrupted run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._repaired = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the steps that a resumed run will repeat."""
        if state.is_world_process_zero:
            self._repair(last_step=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line and sync it to disk."""
        if not state.is_world_process_zero or not logs:
            return
        if not self._repaired:
            self._repair(last_step=None)
        values = {key: _plain(value) for key, value in logs.items()}
        line = {**values, "step": state.global_step, "epoch": state.epoch, "time": time.time()}
        append_line(self.path, line)

    def _repair(self, last_step: int | None) -> None:
        self._repaired = True
        repair_lines(self.path, last_step)


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append one JSON object and sync it to disk."""
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(line, allow_nan=False) + "\n")
        handle.flush()
        os.fsync(handle.fileno())


def repair_lines(path: Path, last_step: int | None) -> None:
    """Rewrite the file without an incomplete last line and, if `last_step` is given, without later steps."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if last_step is None or line["step"] <= last_step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    if text != path.read_text(encoding="utf-8"):
        write_text(path, text)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every complete line, in order; an incomplete last line is skipped."""
    *complete, _incomplete = path.read_text(encoding="utf-8").split("\n")
    return [_parse(path, number, line) for number, line in enumerate(complete, start=1)]


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not isinstance(value.get("step"), int):
        do = "remove the line, or start in another output_dir"
        raise RunError(Problem(f"{path}:{number}", "not a line that a run has written", do, got=repr(line[:80])))
    return value


def _plain(value: Any) -> Any:
    """A value that JSON can hold: tensors and NumPy scalars as numbers, NaN and infinities by name."""
    number = value.item() if hasattr(value, "item") else value
    return str(number) if isinstance(number, float) and not math.isfinite(number) else number
