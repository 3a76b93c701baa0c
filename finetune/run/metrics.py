"""The metrics of a run: `metrics.jsonl`, the loss curve, and the facts in the adapter's record.

`metrics.jsonl` has one JSON object per log event, on disk before the next step starts; times and rates, in which two
runs of one recipe differ, stand in `times.jsonl`. The curve shows the loss, the figures of preference pairs and the
balance term on separate axes.
"""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.files import write_atomically
from finetune.run.lines import append_line, read_metrics, repair_lines
from finetune.run.run_folder import RunFolder


def is_time(name: str) -> bool:
    """Whether a logged figure is a time or a rate, not one of the training."""
    return name == "time" or name.endswith(("_time", "_runtime", "_per_second"))


class MetricsCallback(TrainerCallback):  # type: ignore[misc]
    """Append what the trainer logs, unrounded, with `step` and `epoch`; times in seconds, `time` since 1970.

    Only the main process writes. A kill can leave an incomplete line; it is removed before the next one is written. A
    continued run removes the steps after its checkpoint, because it repeats them, and the line of its end: the file
    looks like that of an uninterrupted run.
    """

    def __init__(self, metrics: Path) -> None:
        self.metrics, self.times = metrics, metrics.with_name("times.jsonl")
        self._repaired = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the steps that a continued run will repeat."""
        if state.is_world_process_zero:
            self._repair(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line to each file and sync it to disk."""
        if not state.is_world_process_zero or not logs:
            return
        if not self._repaired:
            self._repair(state.global_step)
        values = {key: _plain(value) for key, value in logs.items()}
        figures = {key: value for key, value in values.items() if not is_time(key)}
        times = {key: value for key, value in values.items() if is_time(key)}
        if figures.keys() - {"epoch"}:
            append_line(self.metrics, {**figures, "step": state.global_step, "epoch": state.epoch})
        append_line(self.times, {"step": state.global_step, **times, "time": time.time()})

    def _repair(self, last_step: int) -> None:
        self._repaired = True
        for path in (self.metrics, self.times):
            repair_lines(path, last_step)


def _plain(value: Any) -> Any:
    """A value that JSON can hold: tensors and NumPy scalars as numbers, NaN and infinities by name."""
    number = value.item() if hasattr(value, "item") else value
    return str(number) if isinstance(number, float) and not math.isfinite(number) else number


# Each panel's y label and the logged keys it shows, with their legend.
_CROSS_ENTROPY = ("cross-entropy (nats/token)", {"ce_loss": "training", "eval_loss": "evaluation"})
_PAIRS = ("loss of the pairs", {"dpo_loss": "training", "eval_loss": "evaluation"})
_TOTAL = ("loss", {"loss": "total training loss", "eval_loss": "evaluation"})
_OTHERS = (
    ("reward margin", {"rewards/margins": "training", "eval_rewards/margins": "evaluation"}),
    ("pairs preferred rightly", {"rewards/accuracies": "training", "eval_rewards/accuracies": "evaluation"}),
    ("balance term (top_k = balanced)", {"balance_loss": "training"}),
)


def draw_loss_curve(metrics_path: Path, png_path: Path) -> bool:
    """Draw `metrics.jsonl` to `png_path`; False, without a file, if the run was too short to log a loss.

    If the method's own loss was not logged, the total loss is drawn.
    """
    lines = read_metrics(metrics_path)
    logged = {key for line in lines for key in line}
    loss = _CROSS_ENTROPY if "ce_loss" in logged else _PAIRS if "dpo_loss" in logged else _TOTAL
    panels = [panel for panel in (loss, *_OTHERS) if logged & panel[1].keys()]
    if not panels:
        return False
    figure = Figure(figsize=(8, 3.5 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (label, keys) in zip(axes, panels, strict=True):
        for key, name in keys.items():
            _draw_series(axis, lines, key, name)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[-1].set_xlabel("optimizer step")
    write_atomically(png_path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    return True


def _draw_series(axis: Any, lines: list[dict[str, Any]], key: str, name: str) -> None:
    points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    if points:
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, marker="o" if len(points) < 100 else None, markersize=3, label=name)


# Logged values that describe the machine or the moment, not the model.
_NOT_OF_THE_MODEL = ("epoch", "learning_rate", "grad_norm", "total_flos")


def training_facts(
    run: RunFolder,
    rows: Mapping[str, Mapping[str, Any]],
    template: str | None,
    template_day: str | None,
    template_args: Mapping[str, Any],
) -> dict[str, Any]:
    """For the adapter's `finetune.json`. `rows`: the counts of each split, as in the audit."""
    kept = ("name", "rows", "tokens", "supervised_tokens", "weight", "content", "digest")
    return {
        "data": {
            split: [{name: dataset[name] for name in kept} for dataset in counts["sets"]]
            for split, counts in rows.items()
        },
        "metrics": final_metrics(read_metrics(run.metrics) if run.metrics.exists() else []),
        "template_sha256": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        "template_day": template_day,
        **({"template_args": dict(template_args)} if template_args else {}),
    }


def final_metrics(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last logged figures of training ("train") and of evaluation ("eval"), each with its step."""
    metrics = {}
    for split, loss in (("train", "loss"), ("eval", "eval_loss")):
        last = next((line for line in reversed(lines) if loss in line), None)
        if last is not None:
            metrics[split] = {name: value for name, value in last.items() if not name.endswith(_NOT_OF_THE_MODEL)}
    return metrics
