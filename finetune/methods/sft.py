"""SFT: TRL's trainer, with the balance term, exact logging, and a stop before a non-finite step."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from finetune.errors import Problem, RecipeError, RunError
from finetune.methods.router_term import RouterTerm
from finetune.moe.same_adapter import refuse_other_adapter
from finetune.recipe import Recipe

RouterObserver = Callable[[int, Mapping[str, Any]], None]
"""Is given the step and the load by layer and expert at each logged line, on the main process."""


def accumulation_steps(recipe: Recipe, num_processes: int) -> int:
    """Micro-batches an optimizer step on each process, so that the global batch is what the recipe says."""
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


def sft_config(recipe: Recipe, output_dir: Path, dashboards: Mapping[str, Any], num_processes: int) -> SFTConfig:
    """TRL's arguments for a recipe. Checkpointing, data and adapter are set up by us, before the trainer.

    `dashboards`: the arguments that decide what the run reports to (`report_to`, `run_name`, `project` ...).
    """
    training = recipe.training
    settings = {
        "output_dir": str(output_dir),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "max_steps": training.max_steps or -1,
        "num_train_epochs": training.num_train_epochs or 1.0,
        "learning_rate": training.learning_rate,
        "per_device_train_batch_size": training.per_device_train_batch_size,
        # A packed row is a batch of its own: rows that only fill up the last batches are masked as a whole.
        "per_device_eval_batch_size": 1 if recipe.data.packing else training.per_device_train_batch_size,
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
        "gradient_checkpointing": False,  # finetune.moe.checkpointing has switched it on, its own way
        "router_aux_loss_coef": 0.0,  # TRL's pooled term stays off; finetune.methods.router_term adds ours
        "logging_nan_inf_filter": False,  # would log an old loss in place of a NaN
        "use_cpu": PartialState().device.type == "cpu",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "max_length": None,
        "packing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    config = SFTConfig(**settings, **dashboards, **training.trainer_args)
    if config.world_size != num_processes:
        raise RunError(
            Problem(
                "launcher",
                f"the trainer counts {config.world_size} processes where {num_processes} were counted before it",
                "launch with `accelerate launch` and a file of accelerate_configs/",
            )
        )
    return config


def real_tokens(inputs: Mapping[str, Any]) -> torch.Tensor:
    """1 for each position that is a token and 0 for padding, `[T]`. A packed row has no padding."""
    mask = inputs.get("attention_mask")
    return (torch.ones_like(inputs["input_ids"]) if mask is None else mask).reshape(-1)


class MoeSftTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's SFTTrainer on rows tokenised by `finetune.data`.

    Adds to TRL: the balance term in the scope of the optimizer step, cross entropy and balance logged apart, an
    evaluation loss that is the mean over all supervised tokens, LoRA weights kept in float32 (TRL casts those of a
    quantised model to bfloat16), and a RunError before a step whose loss or gradient is not finite.
    """

    def __init__(
        self,
        *args: Any,
        model: Any,
        router_term: RouterTerm | None,
        router_observers: Sequence[RouterObserver] = (),
        **kwargs: Any,
    ) -> None:
        trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(*args, model=model, **kwargs)
        for parameter, data in trained:
            parameter.data = data
        self.router_term, self.router_observers = router_term, router_observers
        self._step_rows: list[list[str]] = []  # of each micro-batch of the running step
        self._step_losses: list[torch.Tensor] = []
        self._window_ce = torch.zeros((), device=self.args.device)  # this rank's, over the steps since the last line
        self._window_steps = 0
        self._eval_sums = torch.zeros(2, dtype=torch.float64)
        self.add_callback(_StepEnd(self))

    def run_from(self, checkpoint: Path | None) -> None:
        """Train to the last step; from a checkpoint also with the balance frequencies and the token count it left.

        Raises RunError where fewer steps were taken than the recipe says: what was saved would not be what was asked.
        """
        if checkpoint is not None:
            refuse_other_adapter(self.accelerator.unwrap_model(self.model), checkpoint)
        if checkpoint is None:
            self.train()
        elif not self._take_over(checkpoint):
            self.train(resume_from_checkpoint=str(checkpoint))
        if self.state.global_step < self.state.max_steps:
            raise RunError(
                Problem(
                    "training",
                    f"the run stopped before its {self.state.max_steps} steps; nothing was saved",
                    "give more rows than one micro-batch holds, and look at training.trainer_args",
                    got=f"{self.state.global_step} steps",
                )
            )

    def _take_over(self, checkpoint: Path) -> bool:
        """Take over what transformers does not from a checkpoint; True if it is that of the last step."""
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        counted = [line["num_tokens"] for line in state["log_history"] if "num_tokens" in line]
        self._total_train_tokens = int(counted[-1]) if counted else 0
        if self.router_term is not None:
            self.router_term.load(checkpoint)
        if state["global_step"] < state["max_steps"]:
            return False
        self._load_from_checkpoint(str(checkpoint))
        self.state.global_step = self.state.max_steps = state["max_steps"]
        return True

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """All micro-batches of one optimizer step; opens the step for the balance term."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_rows = [sample["rows"] for sample in samples]
        self._step_losses.clear()
        if self.router_term is not None and samples:
            tokens = torch.stack([real_tokens(sample).sum() for sample in samples]).sum().to(device)
            self.router_term.begin_step(self._sum_over_ranks(tokens), self._will_log(self.state.global_step + 1))
        return samples, num_items

    def _will_log(self, step: int) -> bool:
        """Whether a line is logged after this optimizer step."""
        return step % self.args.logging_steps == 0 or (step == 1 and self.args.logging_first_step)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross entropy of the micro-batch, normalised by the step's supervised tokens, plus its share of the term."""
        inputs.pop("rows")
        if not self.model.training:
            return self._evaluation_loss(model, inputs, return_outputs)
        term = self.router_term
        with nullcontext() if term is None else term.capture() as record:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self._window_ce += loss.detach()
        if term is not None and record is not None:
            loss = term.add(loss, record, real_tokens(inputs), self.accelerator.num_processes)
        self._step_losses.append(loss.detach())
        return loss

    def _evaluation_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """Cross entropy alone; also summed up, so that the reported value weighs every supervised token the same."""
        self._mask_repeated_rows(inputs["labels"])
        result = super().compute_loss(model, inputs, return_outputs=return_outputs)
        loss = result[0] if return_outputs else result
        tokens = inputs["labels"][..., 1:].ne(-100).sum()
        self._eval_sums += torch.stack([loss.double() * tokens, tokens.double()]).cpu()
        return result

    def _mask_repeated_rows(self, labels: torch.Tensor) -> None:
        """With several processes the last batches are filled up with rows from the beginning: they count once."""
        state = self.accelerator.gradient_state
        if state.end_of_dataloader and state.remainder > 0:
            first = self.accelerator.process_index * labels.shape[0]
            labels[max(state.remainder - first, 0) :] = -100

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As transformers', with the loss averaged over tokens instead of over batches."""
        self._eval_sums.zero_()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, tokens = self._sum_over_ranks(self._eval_sums.to(self.args.device)).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(tokens, 1.0)
        return output

    def end_step(self) -> None:
        """Close the optimizer step over all of its micro-batches and ranks; waits for nothing."""
        self._window_steps += 1
        if self.router_term is not None:
            self.router_term.end_step(self._sum_over_ranks)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add cross entropy and the router's figures, apart, as means over the optimizer steps since the last line."""
        if "loss" in logs:
            ce = self._sum_over_ranks(self._window_ce) / self.accelerator.num_processes
            logs["ce_loss"] = ce.item() / max(self._window_steps, 1)
            self._window_ce.zero_()
            self._window_steps = 0
            if self.router_term is not None:
                figures, load = self.router_term.figures()
                logs |= figures
                for look in self.router_observers if self.is_world_process_zero() else ():
                    look(self.state.global_step, load)
        super().log(logs, *args, **kwargs)

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip; stop here, before the optimizer step, where a loss or the gradient is not finite.

        The only place in a step, logging aside, that waits for the device.
        """
        norm = super()._clip_grad_norm(model)
        norm_value, *losses = torch.stack([each.float() for each in (norm.detach(), *self._step_losses)]).tolist()
        for loss, rows in zip(losses, self._step_rows, strict=True):
            if not math.isfinite(loss):
                raise self._not_finite("loss", loss, rows)
        # In float16 the gradient scaler meets overflows as a matter of course and skips the step by itself.
        if self.accelerator.scaler is None and not math.isfinite(norm_value):
            raise self._not_finite("gradient norm", norm_value, [row for rows in self._step_rows for row in rows])
        return norm

    def _not_finite(self, what: str, value: float, rows: list[str]) -> RunError:
        shown = ", ".join(rows[:32]) + (" ..." if len(rows) > 32 else "")
        router = None if self.router_term is None else self.router_term.first_not_finite()
        first = "" if router is None else f"; the first router with logits that are not finite: {router}"
        return RunError(
            Problem(
                f"step {self.state.global_step + 1}",
                f"the {what} is not finite; the optimizer step was not taken{first}; rows of the step: {shown}",
                "look at these rows, lower training.learning_rate, or use model.dtype bfloat16 instead of float16",
                got=str(value),
            )
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.router_term is not None and self.is_world_process_zero():
            self.router_term.save(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As transformers', without the whole embedding, which PEFT would add where new tokens made it longer."""
        model = self.model
        model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            del model.save_pretrained

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """As transformers', without the rows of added tokens: they stand for tokens, and 0 is no neutral token."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if ".trainable_tokens_delta." not in name]

    def _sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = self.accelerator.reduce(tensor.clone(), reduction="sum")
        return total


class _StepEnd(TrainerCallback):  # type: ignore[misc]
    """Closes each optimizer step before anything of it is logged or saved; evaluates after the last one."""

    def __init__(self, trainer: MoeSftTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.end_step()
        if state.global_step >= state.max_steps and self.trainer.eval_dataset is not None:
            control.should_evaluate = True
