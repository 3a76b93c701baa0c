"""The routers' load in the run folder: one line a logged step, continued where a run is, and drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import TrainerControl, TrainerState, TrainingArguments

from finetune.run import RouterLoadCallback, draw_router_load, read_metrics
from finetune.run.router_load import load_picture

LOAD = {"layers": [1, 2], "tokens": [[4, 4, 0, 0], [2, 2, 2, 2]], "max_load": [2.0, 1.0]}


def begin(callback: RouterLoadCallback, tmp_path: Path, step: int) -> None:
    state = TrainerState(global_step=step, is_world_process_zero=True)
    callback.on_train_begin(TrainingArguments(output_dir=str(tmp_path), use_cpu=True), state, TrainerControl())


def test_a_line_holds_what_was_shown(tmp_path: Path) -> None:
    callback = RouterLoadCallback(tmp_path / "router_load.jsonl")
    begin(callback, tmp_path, 0)
    callback.show_router(5, LOAD)
    assert read_metrics(tmp_path / "router_load.jsonl") == [{"step": 5, **LOAD}]


def test_a_resumed_run_takes_out_the_steps_after_its_checkpoint_and_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "router_load.jsonl"
    callback = RouterLoadCallback(path)
    for step in (1, 2, 3):
        callback.show_router(step, LOAD)
    path.write_text(path.read_text() + '{"step": 4, "tok')
    begin(callback, tmp_path, 2)
    callback.show_router(3, LOAD)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]


def test_a_picture_has_a_block_for_each_expert_of_each_layer_and_balanced_is_the_middle_of_the_scale() -> None:
    picture = load_picture([[4, 4, 0, 0], [2, 2, 2, 2]])
    assert picture.shape == (16, 32, 3)
    assert picture.dtype == np.uint8
    (red, _, most_blue), (least_red, _, blue) = picture[0, 0].tolist(), picture[0, 31].tolist()
    assert red > most_blue
    assert blue > least_red
    assert len({tuple(pixel) for pixel in picture[8:].reshape(-1, 3).tolist()}) == 1
    assert max(picture[8, 0].tolist()) - min(picture[8, 0].tolist()) < 10, "grey"


@pytest.mark.parametrize("layers", [2, 48])
def test_the_first_and_the_last_line_are_drawn(tmp_path: Path, layers: int) -> None:
    callback = RouterLoadCallback(tmp_path / "router_load.jsonl")
    load: dict[str, Any] = {"layers": list(range(layers)), "tokens": [[4, 4, 0, 0]] * layers}
    callback.show_router(1, load)
    callback.show_router(9, {**load, "tokens": [[2, 2, 2, 2]] * layers})
    assert draw_router_load(tmp_path / "router_load.jsonl", tmp_path / "load.png")
    with Image.open(tmp_path / "load.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    left, right = np.split(pixels[:, : pixels.shape[1] // 2 * 2], 2, axis=1)
    strong = [int(((half.max(-1) - half.min(-1)) > 120).sum()) for half in (left, right[:, : right.shape[1] * 3 // 4])]
    assert strong[0] > 10_000 > strong[1], "uneven on the left, even on the right"


def test_nothing_is_drawn_for_a_run_without_routers(tmp_path: Path) -> None:
    assert not draw_router_load(tmp_path / "router_load.jsonl", tmp_path / "load.png")
    assert not (tmp_path / "load.png").exists()
