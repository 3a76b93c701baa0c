"""Runs of the equivalence tests: three steps of a tiny model through the real trainer, and what to compare of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from finetune.base import read_base
from finetune.methods.common import TrainerSetup
from finetune.methods.sft import MoeSftTrainer, make_trainer, prepare_rows
from finetune.model import adapt, load_base
from finetune.recipe import Recipe
from finetune.run import Dashboards, RunFolder

WORDS = ["turn", "the", "light", "on", "in", "the", "kitchen", "and", "set", "a", "timer", "for", "ten", "minutes"]


TIMINGS = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch")
"""What an evaluation reports that is no figure of the model."""


@dataclass
class Steps(TrainerCallback):  # type: ignore[misc]
    """What the trainer had at each optimizer step: gradients by name, and the logged values."""

    model: Any
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)
    max_grad_norm: float = 1e9

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        named = self.model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.requires_grad})

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.logs.append(dict(logs))


def write_rows(path: Path, count: int = 32) -> Path:
    """Rows of different lengths, so that each cut pads differently."""
    lines = [
        {"prompt": " ".join(WORDS[: 2 + i % 9]), "completion": " ".join(WORDS[i % 5 : i % 5 + 1 + i % 4])}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def recipe(base: Path, rows: Path, out: Path, router: dict[str, Any] | None = None, **training: Any) -> Recipe:
    """Three steps of one micro-batch of eight rows, everything adapted; `router` is that section, the rest training."""
    data = {"path": str(rows), "format": "prompt_completion"}
    packing = training.pop("packing", False)
    with_eval = training.pop("with_eval", False)
    attention = training.pop("attn_implementation", "sdpa")
    return Recipe.model_validate(
        {
            "output_dir": str(out),
            "model": {
                "name_or_path": str(base),
                "load_in_4bit": True,
                "dtype": "float32",
                "attn_implementation": attention,
            },
            "lora": {"targets": ["attention", "experts", "router"], "r": 4, "lora_alpha": 8.0},
            "router": router or {"router_aux_loss_coef": 0.1},
            "method": {"kind": "sft"},
            "data": {
                "train": data,
                "eval": data if with_eval else None,
                "max_length": training.pop("max_length", 128),
                "packing": packing,
            },
            "training": {
                "max_steps": 3,
                "learning_rate": 0.05,
                "lr_scheduler_type": "constant",
                "global_batch_size": 8,
                "per_device_train_batch_size": 8,
                "gradient_checkpointing": "none",
                "max_grad_norm": 1e9,
                **training,
            },
            "logging": {"report_to": "none"},
        }
    )


def trainer_for(recipe: Recipe) -> tuple[MoeSftTrainer, Steps]:
    """The trainer as `finetune.train` builds it."""
    torch.manual_seed(recipe.seed)
    base = read_base(recipe)
    rows = prepare_rows(recipe, base)
    model = adapt(load_base(base, recipe.model), base, recipe)
    dashboards = Dashboards((), {"report_to": [], "disable_tqdm": True}, ())
    trainer = make_trainer(
        TrainerSetup(recipe, RunFolder(Path(recipe.output_dir)), base, model, rows, None, dashboards)
    )
    trainer.__dict__["_save_checkpoint"] = lambda *_: None  # without checkpoints
    steps = Steps(model)
    trainer.add_callback(steps)
    return trainer, steps


def run(recipe: Recipe) -> Steps:
    trainer, steps = trainer_for(recipe)
    trainer.train()
    return steps


def assert_changes_nothing(trainer: Any) -> None:
    """A micro-batch without rows: no loss, a gradient of 0 for every trained parameter, nothing in any figure."""
    batch, none = trainer.data_collator([]), torch.zeros((), dtype=torch.int64)
    assert batch["rows"] == []
    assert batch["weight"].sum() == 0
    trainer.model.train()
    trainer.begin_step([batch], trainer.args.device)
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), num_items_in_batch=none)
    loss.backward()
    assert loss == 0
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert [name for name, gradient in gradients.items() if gradient is None or gradient.count_nonzero()] == []
    trainer.model.eval()
    with torch.no_grad():
        assert trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)) == 0
    assert not trainer._window.count_nonzero()
    assert not trainer._eval_window.count_nonzero()
    assert trainer.num_tokens == 0
    assert not trainer.router_term.balance.total(lambda sums: sums).count_nonzero()


def padded_with_eos(recipe: Recipe) -> Recipe:
    """The recipe with the EOS, which ends every answer, in place of the tiny tokenizer's own pad token."""
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"pad_token": "<|im_end|>"})})


def assert_same_steps(one: Steps, other: Steps, keys: Sequence[str] = ("loss", "ce_loss", "balance_loss")) -> None:
    """Loss, its parts and every gradient of every step, within 1e-5."""
    assert len(one.gradients) == len(other.gradients) == 3
    for ours, theirs in zip(one.gradients, other.gradients, strict=True):
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-4, msg=name)
    for ours_log, theirs_log in zip(one.logs[:3], other.logs[:3], strict=True):
        for key in keys:
            assert ours_log[key] == pytest.approx(theirs_log[key], abs=1e-5), key
