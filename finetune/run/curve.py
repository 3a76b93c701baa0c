"""The loss curve of a run as an image: loss, figures of preference pairs and balance term on separate axes."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from finetune.files import write_atomically
from finetune.run.metrics import read_metrics

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
