"""Run folders as training leaves them, without the training: adapters with random weights."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.base import Base, read_base
from finetune.checkpoint import write_sums
from finetune.model import adapt, load_base, save_adapter, snapshot_adapter
from finetune.moe.router_bias import find_biases
from finetune.recipe import Recipe, dump_recipe
from finetune.run.checkpoints import IDENTITY_FILE, STATE_FILE, TRAINING_FILES
from tests.families import save_tiny

EVAL_LOSSES = {2: 4.5, 4: 4.25, 6: 4.375}
"""Evaluations of the run by step: the best one is that of step 4."""


@dataclass(frozen=True)
class MadeRun:
    """A finished run of six steps, its recipe, and what makes further adapters of it."""

    folder: Path
    recipe: Recipe
    base: Base
    save: Callable[[Path, int], None]


def save_run(workspace: Path) -> MadeRun:
    """`workspace/run`, with checkpoints of steps 4 and 6, on a tiny DeepSeek-V3 whose router biases have moved."""
    save_tiny("deepseek_v3", workspace / "base")
    rows = {"path": str(workspace / "rows.jsonl"), "format": "prompt_completion"}
    settings: dict[str, Any] = {
        "output_dir": str(workspace / "run"),
        "model": {"name_or_path": str(workspace / "base"), "load_in_4bit": True, "dtype": "float32"},
        "lora": {"targets": ["attention", "experts", "router"], "r": 2, "lora_alpha": 4.0},
        "router": {"router_aux_loss_coef": 0.1, "bias_update_rate": 0.02},
        "method": {"kind": "sft"},
        "data": {"train": rows, "eval": rows, "max_length": 64},
        "training": {"max_steps": 6, "learning_rate": 1e-3, "global_batch_size": 1, "eval_steps": 2, "save_steps": 2},
    }
    recipe = Recipe.model_validate(settings)
    (workspace / "rows.jsonl").write_text(json.dumps({"prompt": "light", "completion": "on"}) + "\n")
    base = read_base(recipe)
    model = adapt(load_base(base, recipe.model), base, recipe)

    def save(folder: Path, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.1)
        assert base.family.moe is not None
        for bias in find_biases(model, base.family.moe).values():
            bias.data.normal_(std=0.1)
        save_adapter(snapshot_adapter(model, base.family), folder, recipe, base)
        base.tokenizer.save_pretrained(folder)
        write_sums(folder)

    run = workspace / "run"
    for step in (4, 6):
        save(run / f"checkpoint-{step}", step)
        make_checkpoint(run / f"checkpoint-{step}", best=4)
    save(run / "adapter", 6)
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    lines = [{"eval_loss": loss, "step": step} for step, loss in EVAL_LOSSES.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return MadeRun(run, recipe, base, save)


def make_checkpoint(folder: Path, best: int | None) -> None:
    """Add to an adapter folder what a checkpoint has besides, and list all of it."""
    step = int(folder.name.rpartition("-")[2])
    loss = None if best is None else EVAL_LOSSES[best]
    state = {"global_step": step, "max_steps": 6, "best_global_step": best, "best_metric": loss}
    (folder / STATE_FILE).write_text(json.dumps(state))
    (folder / IDENTITY_FILE).write_text(json.dumps({"identity": "0" * 64}))
    (folder / "router_balance.json").write_text(json.dumps({"frequency": [[1.0]], "bias": {"x": [1.0]}}))
    for name in TRAINING_FILES:
        (folder / name).write_text(f"state of step {step}")
    write_sums(folder)
