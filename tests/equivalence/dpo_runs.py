"""DPO runs of the equivalence tests: three steps of a tiny model through the real trainer."""

import json
from pathlib import Path
from typing import Any

import torch

from finetune.adapters.initial import read_initial_adapter
from finetune.base import read_base
from finetune.methods.common import TrainerSetup
from finetune.methods.dpo import make_trainer, prepare_rows
from finetune.methods.dpo_trainer import MoeDpoTrainer
from finetune.model import adapt, load_base
from finetune.recipe import Recipe
from finetune.run import Dashboards, RunFolder
from tests.equivalence.sft_runs import WORDS, Steps

PAIR_KEYS = ("loss", "dpo_loss", "rewards/margins", "logps/chosen", "entropy", "balance_loss")


def write_pairs(path: Path, count: int = 32) -> Path:
    """Pairs whose prompts and answers all have lengths of their own."""
    lines = [
        {
            "prompt": " ".join(WORDS[i % 3 : 3 + i % 9]),
            "chosen": " ".join(WORDS[i % 5 : i % 5 + 1 + i % 4]),
            "rejected": " ".join(WORDS[i % 7 : i % 7 + 2 + i % 5]) + " please",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def dpo_recipe(base: Path, pairs: Path, out: Path, method: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    """Three steps of one micro-batch of eight pairs, everything adapted; `changes` are of the section training."""
    source = {"path": str(pairs), "format": "preference"}
    lora = changes.pop("lora", {})
    router = changes.pop("router", {"router_aux_loss_coef": 0.1})
    model, data = changes.pop("model", {}), changes.pop("data", {})
    return Recipe.model_validate(
        {
            "output_dir": str(out),
            "model": {"name_or_path": str(base), "load_in_4bit": True, "dtype": "float32", **model},
            "lora": {"targets": ["attention", "experts", "router"], "r": 4, "lora_alpha": 8.0, **lora},
            "router": router,
            "method": {"kind": "dpo", "beta": 0.5, **(method or {})},
            "data": {"train": source, "eval": source, "max_length": 128, **data},
            "training": {
                "max_steps": 3,
                "learning_rate": 0.02,
                "lr_scheduler_type": "constant",
                "global_batch_size": 8,
                "per_device_train_batch_size": 8,
                "gradient_checkpointing": "none",
                "max_grad_norm": 1e9,
                **changes,
            },
            "logging": {"report_to": "none"},
        }
    )


def dpo_trainer(recipe: Recipe) -> tuple[MoeDpoTrainer, Steps]:
    """The trainer as `finetune.train` builds it."""
    torch.manual_seed(recipe.seed)
    base = read_base(recipe)
    rows = prepare_rows(recipe, base)
    initial = None if recipe.model.adapter is None else read_initial_adapter(Path(recipe.model.adapter))
    model = adapt(load_base(base, recipe.model), base, recipe, initial_adapter=initial)
    dashboards = Dashboards((), {"report_to": [], "disable_tqdm": True}, ())
    run = RunFolder(Path(recipe.output_dir))
    trainer = make_trainer(TrainerSetup(recipe, run, base, model, rows, initial, dashboards))
    trainer.__dict__["_save_checkpoint"] = lambda *_: None  # without checkpoints
    steps = Steps(model)
    trainer.add_callback(steps)
    return trainer, steps


def dpo_run(recipe: Recipe) -> Steps:
    trainer, steps = dpo_trainer(recipe)
    trainer.train()
    return steps
