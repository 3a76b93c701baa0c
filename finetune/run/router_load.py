"""Router load by layer and expert: `router_load.jsonl`, one line per logged step, and plots of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.files import write_atomically
from finetune.run.lines import append_line, read_metrics, repair_lines

_PIXELS = 8  # width and height of one cell (expert of a layer) in a dashboard's image
_COLOURS = "coolwarm"
_FULL_SCALE = 2.0  # load / mean load at the end of the colour map; balanced is its middle
CAPTION = f"load / mean load, 0 (blue) to {_FULL_SCALE:g} and above (red); a row a layer, a column an expert"


class RouterLoadCallback(TrainerCallback):  # type: ignore[misc]
    """Writes the load of each logged step, on the main process; a resumed run removes the steps that it repeats.

    A line: `step`, `layers` (numbers of the MoE layers), `tokens` (by layer and expert: real tokens of that step whose
    top-k held the expert), and by layer `max_load`, `entropy`, `dead_experts` and, where training changes the router,
    `changed`: the share of tokens whose experts differ from the base router's choice for the same input.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove an incomplete line and the steps that a resumed run will repeat."""
        if state.is_world_process_zero:
            repair_lines(self.path, last_step=state.global_step)

    def show_router(self, step: int, load: Mapping[str, Any]) -> None:
        """Append one line and sync it to disk."""
        append_line(self.path, {"step": step, **load})


def relative_load(tokens: list[list[int]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Load over the layer's mean load, `[L, E]`; 1 = balanced."""
    counts = np.asarray(tokens, dtype=np.float64)
    relative: np.ndarray[Any, np.dtype[np.float64]] = counts / np.maximum(counts.mean(-1, keepdims=True), 1e-12)
    return relative


def load_picture(tokens: list[list[int]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """RGB, a block of pixels for each expert of each layer."""
    colours = mpl.colormaps[_COLOURS](relative_load(tokens) / _FULL_SCALE, bytes=True)[..., :3]
    picture: np.ndarray[Any, np.dtype[np.uint8]] = colours.repeat(_PIXELS, axis=0).repeat(_PIXELS, axis=1)
    return picture


def draw_router_load(path: Path, png_path: Path) -> bool:
    """Draw the first and the last line of `router_load.jsonl`; False, and no file, where there is none."""
    lines = read_metrics(path) if path.is_file() else []
    if not lines:
        return False
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, line in zip(axes, (lines[0], lines[-1]), strict=True):
        image = axis.imshow(
            relative_load(line["tokens"]),
            cmap=_COLOURS,
            vmin=0,
            vmax=_FULL_SCALE,
            aspect="auto",
            interpolation="nearest",
        )
        axis.set_title(f"step {line['step']}")
        axis.set_xlabel("expert")
        shown = range(0, len(line["layers"]), 1 + len(line["layers"]) // 17)
        axis.set_yticks(shown, [line["layers"][row] for row in shown])
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="load / mean load", extend="max")
    write_atomically(png_path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    return True
