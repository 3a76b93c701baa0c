"""Base of every trainer: an optimizer step does not depend on how it is cut into micro-batches.

`StepExactTrainer` goes before TRL's trainer among the base classes. It adds the router term in the scope of the
optimizer step, figures that are exact over all ranks and micro-batches, and a stop before a step that is not finite.
`RunTrainer` (`run_trainer.py`) adds checkpoints.

T tokens, flattened.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from finetune.methods.batches import BatchLoader, NumberedRows, evaluation_batches, loader, training_batches
from finetune.methods.loss_head import fit_head
from finetune.methods.router_term import RouterTerm
from finetune.methods.training_state import rng_state, set_rng_state
from finetune.methods.watchdog import RankRows, StepFigures, Watchdog
from finetune.moe.dropout import token_keys_of
from finetune.moe.sharding import is_sharded, whole
from finetune.progress import PROGRESS, phase
from finetune.recipe.run_settings import WatchdogSettings
from finetune.upstream import require, require_reads

require(
    "transformers.trainer:Trainer._clip_grad_norm",
    "transformers.trainer:Trainer._defer_fsdp_gradient_reduction",
    "transformers.trainer:Trainer._prepare_inputs",
    "transformers.trainer:Trainer.get_batch_samples",
    "transformers.trainer:Trainer.get_decay_parameter_names",
)
for _name in ("_run_epoch", "_maybe_log_save_evaluate"):
    require_reads(f"transformers.trainer:Trainer.{_name}")

RouterObserver = Callable[[int, Mapping[str, Any]], None]
"""Called with the step and the load by layer and expert for each logged line, on the main process."""

# For the type checker; at run time TRL's trainer follows in the method resolution order.
_Trainer: Any = Trainer if TYPE_CHECKING else object


class StepExactTrainer(_Trainer):  # type: ignore[misc]
    """Base of the trainers; a method defines `sums` and the `figures` made of them.

    LoRA weights stay in float32 (TRL casts those of a quantised model to bfloat16).
    """

    sums: tuple[str, ...]
    """Names of the sums over micro-batches and ranks, in training and in evaluation."""

    def __init__(
        self,
        *args: Any,
        model: Any,
        router_term: RouterTerm | None,
        router_observers: Sequence[RouterObserver] = (),
        watchdog: Watchdog | None = None,
        **kwargs: Any,
    ) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)  # TRL casts those of a quantised model that are trained
        super().__init__(*args, model=model, **kwargs)
        for parameter in trained:
            parameter.requires_grad_(True)
        # transformers then leaves the model as it is, as one that it has itself sharded while loading.
        self.is_distributed_loading_by_transformers = is_sharded(model)
        fit_head(self.model.get_base_model())
        self.router_term, self.router_observers = router_term, router_observers
        self.token_keys = token_keys_of(self.model)
        self._step_rows: list[list[str]] = []  # of each micro-batch of the running step
        self._step_losses: list[torch.Tensor] = []
        self.watchdog = watchdog or Watchdog(WatchdogSettings(), Path(self.args.output_dir))
        self._skipped = False  # whether the running step was skipped
        # This rank's sums: over the steps since the last line, and over the running evaluation.
        self._window, self._eval_window = (self._zeros() for _ in range(2))
        self._window_steps = 0
        self._tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)  # of all steps of the run so far
        self.add_callback(_StepEnd(self))

    def weights(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """How many tokens of an unshared batch each position stands for, 0 for padding; flattened, `[T]`."""
        weight: torch.Tensor = inputs["weight"].reshape(-1)
        return weight

    def figures(self, sums: dict[str, float], steps: int) -> dict[str, float]:
        """The logged figures, from the sums over all ranks and `steps` optimizer steps."""
        raise NotImplementedError

    def evaluation_figures(self, sums: dict[str, float]) -> dict[str, float]:
        """The figures of an evaluation, `loss` among them, from its sums over all ranks."""
        raise NotImplementedError

    def own_state(self) -> dict[str, Any]:
        """This rank's sums since the last logged line and the watchdog's, for a checkpoint; reads from the device."""
        router = {} if self.router_term is None else self.router_term.window()
        sums = {"window": self._window.tolist(), "steps": self._window_steps, **router}
        last_line = {"loss": self._tr_loss.item(), "logged": self._globalstep_last_logged}
        return {**sums, **last_line, "watchdog": self.watchdog.state_dict()}

    def load_own_state(self, state: Mapping[str, Any], num_tokens: int) -> None:
        """Continue from `own_state()` and `num_tokens`; call it when the training has begun."""
        self._window += torch.tensor(state["window"], dtype=self._window.dtype, device=self._window.device)
        self._window_steps = state["steps"]
        if self.router_term is not None:
            self.router_term.load_window(state)
        self._tr_loss += state["loss"]
        self._globalstep_last_logged = state["logged"]
        self.watchdog.load_state_dict(state["watchdog"])
        self._tokens = torch.full_like(self._tokens, num_tokens)

    def get_train_dataloader(self) -> BatchLoader:
        """This process's micro-batches of every epoch; not one that accelerate divides among processes."""
        accelerator, rows = self.accelerator, self.train_dataset
        batches = training_batches(rows, self.args, accelerator.process_index, accelerator.num_processes)
        return loader(rows if self.token_keys is None else NumberedRows(rows), batches, self.data_collator, self.args)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> BatchLoader:
        """This process's batches of the evaluation rows, as many as the others have."""
        accelerator, rows = self.accelerator, self.eval_dataset if eval_dataset is None else eval_dataset
        batches = evaluation_batches(rows, self.args, accelerator.process_index, accelerator.num_processes)
        return loader(rows, batches, self.data_collator, self.args)

    def settle_buckets(self) -> None:
        """Let DDP order its buckets, as it does by its first backward, before the first step, by one of no rows.

        Where a gradient stands in a bucket decides in which order three and more processes add it: a continued run
        would round its first step in another way than an uninterrupted one.
        """
        if not isinstance(self.model_wrapped, DistributedDataParallel):
            return
        generators = rng_state()
        self.model.train()
        inputs = self._prepare_inputs(self.data_collator([]))
        if self.token_keys is not None:
            self.token_keys.begin(self.args.seed, 0, torch.zeros_like(inputs["weight"]))
        with self.compute_loss_context_manager():
            items = torch.ones((), dtype=torch.int64, device=self.args.device)
            loss = self.compute_loss(self.model_wrapped, inputs, num_items_in_batch=items)
        loss.backward()
        self.model_wrapped.zero_grad(set_to_none=True)
        self._step_losses.clear()
        set_rng_state(generators)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """All micro-batches of one optimizer step; opens the step for the balance term."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        samples = [self._prepare_inputs(sample) for sample in samples]  # to the device, before the first forward
        self._step_rows = [sample["rows"] for sample in samples]
        self._step_losses.clear()
        self._skipped = False
        if self.watchdog.may_skip:
            self._before_step = self._tr_loss.clone(), self._window.clone()
        if samples:
            self.begin_step(samples, device)
        return samples, num_items

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As TRL's; dropout is told which tokens the micro-batch holds."""
        if self.token_keys is not None:
            # A micro-batch without rows is one token of weight 0.
            places = inputs.pop("places") if inputs["rows"] else torch.zeros_like(inputs["weight"])
            self.token_keys.begin(self.args.seed, self.state.global_step, places)
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def begin_step(self, samples: list[Any], device: torch.device) -> None:
        """Open an optimizer step, of which `samples` are this rank's micro-batches."""
        PROGRESS.begin_step(self.state.global_step + 1)
        tokens = torch.stack([self.weights(sample).sum() for sample in samples]).sum().to(device)
        tokens = self.sum_over_ranks(tokens)
        self._tokens = self._tokens + tokens
        if self.router_term is not None:
            self.router_term.begin_step(tokens, self.will_log)

    @property
    def will_log(self) -> bool:
        """Whether a line is logged after the running optimizer step."""
        step: int = self.state.global_step + 1
        return bool(step % self.args.logging_steps == 0 or (step == 1 and self.args.logging_first_step))

    def count(self, **values: torch.Tensor) -> None:
        """Add to the sums; without gradient, and without waiting for the device."""
        window = self._window if self.model.training else self._eval_window
        window += torch.stack([values[name].detach().double().to(window.device) for name in self.sums])

    def with_router_term(self, loss: torch.Tensor, record: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The micro-batch's loss with its share of the term; kept for the check of finite values."""
        if self.router_term is not None and record is not None:
            loss = self.router_term.add(loss, record, self.weights(inputs), self.accelerator.num_processes)
        self._step_losses.append(loss.detach())
        return loss

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As transformers', with exact figures in place of means of batch means."""
        self._eval_window.zero_()
        with phase("evaluating"):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        figures = self.evaluation_figures(self._over_ranks(self._eval_window))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def end_step(self) -> None:
        """Close the optimizer step over all of its micro-batches and ranks, without waiting for the device."""
        self._window_steps += not self._skipped
        if self.router_term is not None:
            self.router_term.end_step(self.sum_over_ranks, self._skipped)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the method's figures and the router's, apart, over the optimizer steps since the last line."""
        if "loss" in logs:
            logs |= self.figures(self._over_ranks(self._window), max(self._window_steps, 1))
            self._window.zero_()
            self._window_steps = 0
            if self.router_term is not None:
                figures, load = self.router_term.figures()
                logs |= figures
                for observe in self.router_observers if self.is_world_process_zero() else ():
                    observe(self.state.global_step, load)
        super().log(logs, *args, **kwargs)

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip; here, before the optimizer step, the watchdog decides whether it is taken, skipped, or the last.

        The only read of the device in a step, apart from logging and from transformers' attention masks.
        """
        norm = whole(super()._clip_grad_norm(model))
        figures, losses = self._step_figures(norm)
        self._skipped = self.watchdog.skips(figures, partial(self._rank_rows, losses), self.is_world_process_zero())
        if self._skipped:
            model.zero_grad(set_to_none=True)  # no optimizer changes a parameter, or its state, without a gradient
            self._forget_step()
        return norm

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Between the micro-batches of a step: gradients are summed up over the processes that share a model.

        transformers would keep the whole adapter's gradients on every process until the last micro-batch. Groups of
        processes that hold a model each (HSDP) still exchange theirs once a step.
        """
        self.model.set_requires_all_reduce(False)
        try:
            yield
        finally:
            self.model.set_requires_all_reduce(True)

    def _step_figures(self, norm: torch.Tensor) -> tuple[StepFigures, list[float]]:
        """The step over all ranks, and the losses of this rank's micro-batches."""
        term, ranks = self.router_term, self.accelerator.num_processes
        loss = torch.stack(self._step_losses).sum()
        dead = loss.new_zeros(()) if term is None else term.dead_share(self.sum_over_ranks).to(loss.device)
        if ranks > 1:
            loss = self.sum_over_ranks(loss) / ranks
        read = torch.stack([value.detach().float() for value in (norm, dead, loss, *self._step_losses)])
        norm_value, dead_value, total, *losses = read.tolist()
        number, scaled = self.state.global_step + 1, self.accelerator.scaler is not None
        dead_experts = None if term is None else dead_value
        return StepFigures(number, self.state.max_steps, total, norm_value, dead_experts, scaled), losses

    def _rank_rows(self, losses: list[float]) -> list[RankRows]:
        """Every rank's rows of the step; may wait for the device."""
        router = None if self.router_term is None else self.router_term.first_not_finite()
        gathered: list[RankRows] = gather_object([RankRows(self._step_rows, losses, router)])
        return gathered

    def _forget_step(self) -> None:
        """Take a skipped step out of the figures since the last line."""
        tr_loss, window = self._before_step
        self._tr_loss.copy_(tr_loss)
        self._window.copy_(window)
        self._globalstep_last_logged += 1  # transformers divides by the steps since this one

    @property
    def num_tokens(self) -> int:
        """Tokens of all steps of the run so far, over all ranks; may wait for the device."""
        return int(self._tokens.item())

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """As transformers', without the rows of added tokens: weight decay would pull their embeddings to 0."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if ".trainable_tokens_delta." not in name]

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `tensor`."""
        total: torch.Tensor = self.accelerator.reduce(tensor.clone(), reduction="sum")
        return total

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(len(self.sums), dtype=torch.float64, device=self.args.device)

    def _over_ranks(self, window: torch.Tensor) -> dict[str, float]:
        return dict(zip(self.sums, self.sum_over_ranks(window).tolist(), strict=True))


class _StepEnd(TrainerCallback):  # type: ignore[misc]
    """Closes each optimizer step before it is logged or saved; evaluates after the last one."""

    def __init__(self, trainer: StepExactTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.settle_buckets()
        if state.is_world_process_zero:
            self.trainer.watchdog.begin(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.end_step()
        if state.global_step >= state.max_steps and self.trainer.eval_dataset is not None:
            control.should_evaluate = True
