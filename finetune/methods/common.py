"""What all methods share: TRL's arguments made from a recipe, the prepared rows, and the set-up of a trainer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback

from finetune.adapters.initial import InitialAdapter
from finetune.base import Base
from finetune.data import DataStats
from finetune.data.tokens.collators import needs_one_row
from finetune.errors import Problem, RecipeError, RunError
from finetune.methods.router_term import RouterTerm
from finetune.moe.audit import audit_model, check_audit
from finetune.moe.families import Family
from finetune.recipe import Recipe
from finetune.run import Dashboards, MetricsCallback, RouterLoadCallback, RunFolder


def accumulation_steps(recipe: Recipe, num_processes: int) -> int:
    """Micro-batches per optimizer step on each process, so that the global batch size is the recipe's."""
    training = recipe.training
    rows = training.per_device_train_batch_size * num_processes
    if training.global_batch_size % rows:
        raise RecipeError(
            Problem(
                "training.global_batch_size",
                f"not divisible by per_device_train_batch_size x processes = "
                f"{training.per_device_train_batch_size} x {num_processes}",
                f"use a multiple of {rows}, or fewer processes",
                got=str(training.global_batch_size),
            )
        )
    return training.global_batch_size // rows


EVALUATION_TOKENS = 2048
"""Tokens of an evaluation batch whose rows are all full, if a micro-batch of training has fewer."""


def evaluation_rows(recipe: Recipe) -> int:
    """Rows of an evaluation batch on one device; the figures do not depend on it.

    Packed rows that go into one row are evaluated one by one: those repeated to fill up the last batches of several
    processes are masked as a whole.
    """
    if recipe.data.packing and needs_one_row(recipe.model.attn_implementation):
        return 1
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
        "per_device_train_batch_size": training.per_device_train_batch_size,
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
        "save_strategy": "steps" if training.save_steps else "no",
        "save_steps": training.save_steps or 500,
        "bf16": recipe.model.dtype == "bfloat16",
        "fp16": recipe.model.dtype == "float16",
        "gradient_checkpointing": False,  # enabled by finetune.moe.checkpointing instead
        "router_aux_loss_coef": 0.0,  # TRL's pooled term stays off; finetune.methods.router_term adds ours
        "logging_nan_inf_filter": False,  # would log an old loss in place of a NaN
        "use_cpu": PartialState().device.type == "cpu",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "max_length": None,
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


class PreparedAudit(TrainerCallback):  # type: ignore[misc]
    """Repeats the audit on the model that is trained, after accelerate has prepared it, and looks at the optimizer."""

    def __init__(self, family: Family, recipe: Recipe) -> None:
        self.family, self.recipe = family, recipe

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
        """Raises RunError where the prepared model differs from the recipe, or the optimizer misses parameters."""
        check_audit(audit_model(model, self.family), self.recipe)
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if trained != stepped:
            what = f"{len(trained)} tensors are to be trained and the optimizer has other ones"
            got = f"{len(stepped)} in the optimizer, {len(trained & stepped)} of them trained"
            raise RunError(Problem("audit", what, "report this: the launcher has replaced parameters", got))


@dataclass(frozen=True)
class MethodRows:
    """`train` and `eval` (None: no evaluation) as the trainer takes them, `collator` makes its batches.

    `conversations` with `conversation_collator`: the same rows one conversation each, for measurements before
    there is an adapter. `remarks`: lines for the user. `stats` by split.
    """

    train: Any
    eval: Any
    collator: Any
    stats: dict[str, DataStats]
    conversations: Any
    conversation_collator: Any
    remarks: Sequence[str] = field(default=())

    def counts(self) -> dict[str, dict[str, Any]]:
        """What the audit and the adapter's record say about the rows of each split."""
        return {split: stats.as_dict() for split, stats in self.stats.items()}


@dataclass(frozen=True)
class TrainerSetup:
    """`initial_adapter`: the adapter that training starts from, if it is not a fresh one."""

    recipe: Recipe
    run: RunFolder
    base: Base
    model: Any
    rows: MethodRows
    initial_adapter: InitialAdapter | None
    dashboards: Dashboards

    @cached_property
    def router_term(self) -> RouterTerm | None:
        """The router term of a mixture of experts, None for a dense model or without the section `router`."""
        if self.base.family.moe is None or self.recipe.router is None:
            return None
        return RouterTerm(self.model, self.base.family, self.recipe.router)

    def arguments(self) -> dict[str, Any]:
        """The arguments that all trainers take."""
        router_load = RouterLoadCallback(self.run.router_load)
        return {
            "model": self.model,
            "router_term": self.router_term,
            "processing_class": self.base.tokenizer,
            "data_collator": self.rows.collator,
            "train_dataset": self.rows.train,
            "eval_dataset": self.rows.eval,
            "callbacks": [
                PreparedAudit(self.base.family, self.recipe),
                MetricsCallback(self.run.metrics),
                router_load,
                *self.dashboards.callbacks,
            ],
            "router_observers": [callback.show_router for callback in (router_load, *self.dashboards.callbacks)],
        }
