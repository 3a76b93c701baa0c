"""TRL's arguments for a recipe, by method. Nothing here imports the trainers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from trl import DPOConfig, SFTConfig

from finetune.errors import Problem, RecipeError, RunError
from finetune.recipe import DpoSettings, Recipe

TOKEN_FIGURES = ("mean_token_accuracy", "entropy")
"""Figures of an SFT evaluation beside its loss."""
PAIR_FIGURES = (
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", *TOKEN_FIGURES),
)
"""Figures of a DPO evaluation beside its loss."""


def micro_batch_rows(recipe: Recipe, num_processes: int) -> int:
    """Rows of a micro-batch: the recipe's number, or the next smaller one by which each process has whole ones.

    The result does not depend on it. Raises RecipeError for a step that so many processes cannot share.
    """
    training = recipe.training
    if training.global_batch_size % num_processes:
        most = max(count for count in range(1, num_processes) if training.global_batch_size % count == 0)
        fewer = f"start {most} process{'es' * (most > 1)}"
        do = f"{fewer}, or train with a multiple of {num_processes}, which is another recipe"
        what = f"not divisible by the number of processes, {num_processes}"
        raise RecipeError(Problem("training.global_batch_size", what, do, got=str(training.global_batch_size)))
    rows = training.global_batch_size // num_processes
    return max(each for each in range(1, training.per_device_train_batch_size + 1) if not rows % each)


def micro_batch_remarks(recipe: Recipe, num_processes: int) -> list[str]:
    """A line where micro-batches are smaller than the recipe says."""
    rows, wanted = micro_batch_rows(recipe, num_processes), recipe.training.per_device_train_batch_size
    if rows == wanted:
        return []
    step = f"a step of {recipe.training.global_batch_size} rows on {num_processes} processes"
    return [f"micro-batches of {rows} in place of per_device_train_batch_size {wanted}: {step}; the result is the same"]


def accumulation_steps(recipe: Recipe, num_processes: int) -> int:
    """Micro-batches per optimizer step on each process, so that the global batch size is the recipe's."""
    return recipe.training.global_batch_size // (num_processes * micro_batch_rows(recipe, num_processes))


EVALUATION_TOKENS = 2048
"""Tokens of an evaluation batch whose rows are all full, if a micro-batch of training has fewer."""


def evaluation_rows(recipe: Recipe) -> int:
    """Rows of an evaluation batch on one device; the figures do not depend on it."""
    tokens = recipe.data.max_length * (2 if recipe.method.kind == "dpo" else 1)
    return max(recipe.training.per_device_train_batch_size, EVALUATION_TOKENS // tokens)


def common_arguments(
    recipe: Recipe, output_dir: Path, dashboards: Mapping[str, Any], num_processes: int
) -> dict[str, Any]:
    """TRL's arguments for a recipe. Checkpointing, data and adapter are set up by us, before the trainer.

    `dashboards`: the arguments of the run's loggers (`report_to`, `run_name`, `project` ...).
    """
    training = recipe.training
    return {
        "output_dir": str(output_dir),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "max_steps": training.max_steps or -1,
        "num_train_epochs": training.num_train_epochs or 1.0,
        "learning_rate": training.learning_rate,
        "per_device_train_batch_size": micro_batch_rows(recipe, num_processes),
        "per_device_eval_batch_size": evaluation_rows(recipe),
        "gradient_accumulation_steps": accumulation_steps(recipe, num_processes),
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_steps": training.warmup_steps,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": training.optim,
        "logging_steps": training.logging_steps,
        "eval_strategy": "steps" if recipe.data.eval and training.eval_steps else "no",
        "eval_steps": training.eval_steps,
        "save_strategy": "steps",
        "save_steps": training.save_steps or 0.1,  # a share of the run's steps
        "bf16": recipe.model.dtype == "bfloat16",
        "fp16": recipe.model.dtype == "float16",
        "gradient_checkpointing": False,  # enabled by finetune.moe.checkpointing instead
        "router_aux_loss_coef": 0.0,  # TRL's pooled term stays off; finetune.methods.router_term adds ours
        "logging_nan_inf_filter": False,  # would log an old loss in place of a NaN
        "use_cpu": PartialState().device.type == "cpu",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,  # every trained parameter takes part in every forward
        "max_length": None,
        **({"metric_for_best_model": "eval_loss"} if recipe.data.eval else {}),
        **dashboards,
        **training.trainer_args,
    }


def check_world_size(config: Any, num_processes: int) -> None:
    """Raise RunError if the trainer's number of processes is not the one that the run counted."""
    if config.world_size != num_processes:
        raise RunError(
            Problem(
                "launcher",
                f"the trainer counts {config.world_size} processes where {num_processes} were counted before it",
                "launch with `accelerate launch` and a file of accelerate_configs/",
            )
        )


def sft_config(recipe: Recipe, output_dir: Path, dashboards: Mapping[str, Any], num_processes: int) -> SFTConfig:
    """TRL's arguments for a recipe; `dashboards` as in `common_arguments`."""
    own = {"packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    config = SFTConfig(**common_arguments(recipe, output_dir, dashboards, num_processes), **own)
    check_world_size(config, num_processes)
    return config


def dpo_config(recipe: Recipe, output_dir: Path, dashboards: Mapping[str, Any], num_processes: int) -> DPOConfig:
    """TRL's arguments for a recipe; `dashboards` as in `common_arguments`."""
    method = recipe.method
    assert isinstance(method, DpoSettings)
    own = {
        "beta": method.beta,
        "loss_type": list(method.loss_type),
        "loss_weights": method.loss_weights,
        "label_smoothing": method.label_smoothing,
        "ld_alpha": method.ld_alpha,
        "f_divergence_type": method.f_divergence_type,
        "f_alpha_divergence_coef": method.f_alpha_divergence_coef,
        "use_weighting": method.use_weighting,
        "discopop_tau": method.discopop_tau,
        "disable_dropout": False,  # the recipe's own; the reference has none
        "precompute_ref_log_probs": False,  # finetune.methods.reference keeps ours
    }
    config = DPOConfig(**common_arguments(recipe, output_dir, dashboards, num_processes), **own)
    check_world_size(config, num_processes)
    return config


def trainer_config(recipe: Recipe, output_dir: Path, dashboards: Mapping[str, Any], num_processes: int) -> Any:
    """TRL's arguments for the recipe's method."""
    make = dpo_config if recipe.method.kind == "dpo" else sft_config
    return make(recipe, output_dir, dashboards, num_processes)


def evaluation_metrics(kind: str) -> tuple[str, ...]:
    """Names, without `eval_`, of the figures that an evaluation of a method reports."""
    return ("loss", *(PAIR_FIGURES if kind == "dpo" else TOKEN_FIGURES))
