"""Base of every trainer: an optimizer step does not depend on how it is cut into micro-batches.

`StepExactTrainer` goes before TRL's trainer among the base classes. It adds the router term in the scope of the
optimizer step, figures that are exact over all ranks and micro-batches, a stop before a step that is not finite, and
checkpoints that a resumed run continues bit for bit.

`fit_head` adapts TRL's fused head. It cuts the logits into tiles of 4,096 tokens and 32,768 entries, of which on the
CPU eight are in memory at once, so that the head would need nearly three times the memory of a full logits tensor, and
take five times as long (`benchmarks/LOG.md`).

T tokens, N of them supervised, H hidden.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback

from finetune.adapters.initial import check_same_factors
from finetune.errors import Problem, RunError
from finetune.files import write_json
from finetune.methods.router_term import RouterTerm
from finetune.methods.watchdog import RankRows, StepFigures, Watchdog
from finetune.recipe.run_settings import WatchdogSettings
from finetune.upstream import changed, require, require_reads

require(
    "transformers.trainer:Trainer._clip_grad_norm",
    "transformers.trainer:Trainer._save_checkpoint",
    "transformers.trainer:Trainer._save",
    "transformers.trainer:Trainer._prepare_inputs",
    "transformers.trainer:Trainer._load_from_checkpoint",
    "transformers.trainer:Trainer.get_batch_samples",
    "transformers.trainer:Trainer.get_decay_parameter_names",
)
for _name in ("_run_epoch", "_maybe_log_save_evaluate"):
    require_reads(f"transformers.trainer:Trainer.{_name}")

TILE = 512
"""Entries of the vocabulary in a tile on the CPU: 8 MB with 4,096 tokens in float32."""


def fit_head(model: Any) -> None:
    """Let a model, to which TRL has added its fused head, take `supervised` positions; on a CPU, also smaller tiles.

    `supervised` are the flattened positions of labels that are not -100, `[N]`. TRL would find them by a mask, which
    waits for the device three times in each micro-batch. The head stays TRL's own function, with its handling of
    architectures; the globals that it reads are replaced, for this model only. Raises UpstreamError where another
    release of TRL no longer looks them up.
    """
    added: Any = model.forward.__func__
    names = dict(added.__globals__)
    log_probs = _SupervisedLogProbs(names.get("_ChunkedLogProbFunction"))
    replaced: dict[str, Any] = {"_ChunkedLogProbFunction": log_probs, "_use_triton": log_probs.by_mask}
    if next(model.parameters()).device.type == "cpu":
        replaced["_CHUNKED_LOGPROB_CHUNK_SIZE"] = TILE
    if missing := replaced.keys() - (names.keys() & set(added.__code__.co_names)):
        raise changed("trl", "add_fused_lm_head", f"no longer reads {' and '.join(sorted(missing))}")
    fitted = FunctionType(added.__code__, names | replaced, added.__name__, added.__defaults__, added.__closure__)
    fitted.__kwdefaults__ = added.__kwdefaults__

    @wraps(added)
    def forward(self: Any, *args: Any, supervised: torch.Tensor | None = None, **kwargs: Any) -> Any:
        log_probs.positions = supervised
        try:
            return fitted(self, *args, **kwargs)
        finally:
            log_probs.positions = None

    model.forward = MethodType(forward, model)


class _SupervisedLogProbs:
    """Replaces TRL's autograd function: computes the log-probabilities at `positions` alone, if they are set."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.positions: torch.Tensor | None = None

    def by_mask(self, _device: torch.device) -> bool:
        """Replaces the check for Triton, which decides whether TRL itself selects the supervised tokens by a mask."""
        return self.positions is None

    def apply(self, hidden: torch.Tensor, weight: Any, bias: Any, labels: torch.Tensor, *settings: Any) -> Any:
        """TRL's figures of each token of `hidden` `[T, H]`, 0 outside of the positions."""
        if self.positions is None:
            return self.function.apply(hidden, weight, bias, labels, *settings)
        positions = self.positions
        selected = hidden.index_select(0, positions), weight, bias, labels.index_select(0, positions)
        values = self.function.apply(*selected, *settings)
        return tuple(
            None if value is None else value.new_zeros(len(hidden)).index_copy(0, positions, value) for value in values
        )


RouterObserver = Callable[[int, Mapping[str, Any]], None]
"""Called with the step and the load by layer and expert for each logged line, on the main process."""

TOKENS_FILE = "num_tokens.json"

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
        trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(*args, model=model, **kwargs)
        for parameter, data in trained:
            parameter.data = data
        fit_head(self.model.get_base_model())
        self.router_term, self.router_observers = router_term, router_observers
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

    def run_from(self, checkpoint: Path | None) -> None:
        """Train to the last step, from a checkpoint if one is given, with its balance frequencies and token count.

        Raises RunError if fewer steps were taken than the recipe says.
        """
        if checkpoint is not None:
            check_same_factors(self.accelerator.unwrap_model(self.model), checkpoint)
        if checkpoint is None:
            self.train()
        elif not self._load_own_state(checkpoint):
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

    def _load_own_state(self, checkpoint: Path) -> bool:
        """Load what transformers does not from a checkpoint; True if it is that of the last step."""
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        tokens = checkpoint / TOKENS_FILE
        if not tokens.is_file():
            do = "start anew in another output_dir"
            raise RunError(Problem(str(tokens), "the checkpoint does not say how many tokens came before it", do))
        self._tokens = torch.full_like(self._tokens, json.loads(tokens.read_text(encoding="utf-8"))["num_tokens"])
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
        self._skipped = False
        if self.watchdog.may_skip:
            self._before_step = self._tr_loss.clone(), self._window.clone()
        if samples:
            self.begin_step(samples, device)
        return samples, num_items

    def begin_step(self, samples: list[Any], device: torch.device) -> None:
        """Open an optimizer step, of which `samples` are this rank's micro-batches."""
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

    def first_repeated(self, rows: int) -> int:
        """How many of this rank's `rows` of an evaluation batch count; the last may be repeats to fill all ranks."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return rows
        left: int = state.remainder - self.accelerator.process_index * rows
        return max(min(left, rows), 0)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As transformers', with exact figures in place of means of batch means."""
        self._eval_window.zero_()
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
        norm = super()._clip_grad_norm(model)
        figures, losses = self._step_figures(norm)
        self._skipped = self.watchdog.skips(figures, partial(self._rank_rows, losses), self.is_world_process_zero())
        if self._skipped:
            model.zero_grad(set_to_none=True)  # no optimizer changes a parameter, or its state, without a gradient
            self._forget_step()
        return norm

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

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            # Not from the log: its last line may be older than the checkpoint.
            write_json(folder / TOKENS_FILE, {"num_tokens": self.num_tokens})
            if self.router_term is not None:
                self.router_term.save(folder)
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
        if state.is_world_process_zero:
            self.trainer.watchdog.begin(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.end_step()
        if state.global_step >= state.max_steps and self.trainer.eval_dataset is not None:
            control.should_evaluate = True
