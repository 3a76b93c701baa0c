"""A trainer whose run survives: checkpoints, signals, the best evaluation, early stopping.

`RunTrainer` replaces what transformers writes and reads of a checkpoint. A continued run takes the same steps, to the
bit, and logs the same figures as one that nothing has interrupted.
"""

import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerState

from finetune.adapters.initial import check_same_factors
from finetune.errors import Problem, RunError
from finetune.methods.checkpointing import CheckpointSaver, Snapshot, adapter_facts, state_text
from finetune.methods.common import TrainerSetup
from finetune.methods.sharded_optimizer import load_state, state_on_main, step_on_parts
from finetune.methods.trainer import StepExactTrainer
from finetune.methods.training_state import read_state, rng_state, set_rng_state, snapshot
from finetune.model import AdapterSnapshot, snapshot_adapter
from finetune.moe.audit import audit_model
from finetune.progress import phase
from finetune.recipe.training_checks import BY_EVALUATION
from finetune.run.checkpoints import STATE_FILE, read_trainer_state
from finetune.run.metrics import is_time
from finetune.run.resume import recorded_identity
from finetune.stopping import EXIT_CODES, stop
from finetune.upstream import require, require_reads

require(
    "transformers.trainer:Trainer._save_checkpoint",
    "transformers.trainer:Trainer._load_from_checkpoint",
    "transformers.trainer:Trainer._load_optimizer_and_scheduler",
    "transformers.trainer:Trainer._load_scaler",
    "transformers.trainer:Trainer._load_rng_state",
    "transformers.trainer:Trainer._init_training_state",
    "transformers.trainer:Trainer._determine_best_metric",
    "transformers.trainer:Trainer._maybe_log_save_evaluate",
    "transformers.trainer:Trainer._evaluate",
)

require_reads("accelerate.accelerator:Accelerator.prepare_model")

_MEASURED_STEPS = 3
_LONG_MINUTES = 30
_SIGNALS = tuple(EXIT_CODES)


class _EvaluationStoppedError(Exception):
    """A signal has come while the run evaluates."""


class RunTrainer(StepExactTrainer):
    """`run_from` trains to the end, or until a signal."""

    def __init__(self, *args: Any, setup: TrainerSetup, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.setup = setup
        self.total_steps = setup.recipe.training.optimizer_steps(len(setup.rows.train))
        between = setup.recipe.training.steps_between_checkpoints(self.total_steps)
        self.saver = CheckpointSaver(setup, between) if self.is_world_process_zero() else None
        self.stopped_by_signal = self.evaluation_due = False
        self._resumed: dict[str, Any] = {}
        self.add_callback(_Flow(self))

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """As transformers', from the audit's counts: of a sharded model it would see this process's bytes."""
        return 6 * int(inputs["input_ids"].numel()) * self._computing

    @cached_property
    def _computing(self) -> int:
        """Number of parameters without the embedding."""
        parts = audit_model(self.model, self.setup.base.family)
        return sum(part.parameters * (part.part != "embeddings") + part.trained for part in parts.values())

    def run_from(self, checkpoint: Path | None) -> bool:
        """Train to the last step, from a checkpoint if one is given; False if a signal ended the run before it.

        Raises RunError if fewer steps were taken than the recipe says.
        """
        # An evaluation that was due when the run began is cut short: its checkpoint is there already.
        with suppress(_EvaluationStoppedError):
            self._train_from(checkpoint)
        if self.saver is not None and self.stopped_by_signal:
            self.saver.wait_or_raise()
        elif self.saver is not None:
            self.saver.wait()
        if not self.stopped_by_signal and not self._is_complete(vars(self.state)):
            raise RunError(
                Problem(
                    "training",
                    f"the run stopped before its {self.total_steps} steps; nothing was saved",
                    "look at training.trainer_args, and report this",
                    got=f"{self.state.global_step} steps",
                )
            )
        return not self.stopped_by_signal

    def _train_from(self, checkpoint: Path | None) -> None:
        if checkpoint is None:
            self.train()
            return
        self._read(checkpoint)
        if self.evaluation_due:
            self._evaluate_now(checkpoint)
        if self._is_complete(read_trainer_state(checkpoint)):
            self._finish_from(checkpoint)
        else:
            self.train(resume_from_checkpoint=str(checkpoint))

    # What ends a run.

    def _is_complete(self, state: Mapping[str, Any]) -> bool:
        patience = self.setup.recipe.training.early_stopping_patience
        stopped = patience is not None and self._evaluations_since_best(state) >= patience
        return bool(state["global_step"] >= self.total_steps or stopped)

    def _evaluations_since_best(self, state: Mapping[str, Any]) -> int:
        best = state["best_global_step"] or 0
        return sum("eval_loss" in line and line["step"] > best for line in state["log_history"])

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As transformers'; a new best one is saved, and too many others end the run."""
        is_best: bool = super()._determine_best_metric(metrics, trial)
        if is_best:
            self.control.should_save = True
        elif self.state.global_step < self.total_steps and self._is_complete(vars(self.state)):
            self.control.should_save = self.control.should_training_stop = True
            if self.is_world_process_zero():
                best = f"{self.args.metric_for_best_model} {self.state.best_metric:.4g}"
                print(
                    f"early stopping at step {self.state.global_step}: the best evaluation is of step "
                    f"{self.state.best_global_step} ({best}); {self.setup.run.path}@best names its checkpoint",
                    flush=True,
                )
        return is_best

    @property
    def rate_follows_evaluations(self) -> bool:
        """Whether an evaluation decides the learning rate; it is then never cut short."""
        return self.setup.recipe.training.lr_scheduler_type in BY_EVALUATION

    def agreed(self) -> int:
        """The signal that ended the run on any process, 0 without one; and whether a checkpoint is tried again.

        With several processes one small sum over all of them, so that all do the same in the same step.
        """
        saver, requested = self.saver, stop.requested
        retry = False
        if saver is not None:
            saver.look()
            retry = saver.retry_at is not None and self.state.global_step >= saver.retry_at
        flags = [float(requested == one) for one in _SIGNALS] + [float(retry)]
        if self.accelerator.num_processes > 1:
            flags = self.sum_over_ranks(torch.tensor(flags, device=self.args.device)).tolist()
        self.control.should_save = self.control.should_save or flags[-1] > 0
        signal = next((one for one, flag in zip(_SIGNALS, flags[:-1], strict=True) if flag), None)
        if signal is not None:
            stop.request(signal)
            self.stopped_by_signal = True
        return 0 if signal is None else int(signal)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As transformers'; an evaluation that a signal cuts short is made again when the run continues."""
        generators = rng_state() if self.control.should_evaluate else {}
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except _EvaluationStoppedError:
            set_rng_state(generators)
            self.evaluation_due = True
            self.control.should_evaluate = False
            self.control.should_save = self.control.should_training_stop = True
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the step-exact trainer's; `train_loss` is that of the whole run, and times are left out of its state."""
        if "train_loss" in logs:
            if self.stopped_by_signal:
                return
            # A skipped step is in no sum.
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step - self.watchdog.skipped_steps, 1)
        super().log(logs, *args, **kwargs)
        history = self.state.log_history
        history[-1] = {name: value for name, value in history[-1].items() if not is_time(name)}

    # What a checkpoint holds.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Take a snapshot of this step; the saver writes it."""
        with phase("saving a checkpoint"):
            self._save_this_step()

    def _save_this_step(self) -> None:
        self.store_flos()
        ranks = gather_object([snapshot({"rng": rng_state(), **self.own_state()})])
        optimizer = state_on_main(self.optimizer, self.saver is not None)
        adapter = snapshot_adapter(self.accelerator.unwrap_model(self.model), self.setup.base.family)
        if self.saver is None:
            return
        scaler = self.accelerator.scaler
        state = {
            "step": self.state.global_step,
            "optimizer": optimizer,
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "ranks": ranks,
            "num_tokens": self.num_tokens,
            "loss_sum": self._total_loss_scalar,
            "position": {"epoch": self.state.epoch, "rows_per_step": self.setup.recipe.training.global_batch_size},
            "evaluation_due": self.evaluation_due,
        }
        self.saver.save(self._snapshot(adapter, snapshot(state)))

    def _snapshot(self, adapter: AdapterSnapshot, state: Mapping[str, Any]) -> Snapshot:
        """This step's; `state`: what `training_state` writes of it."""
        return Snapshot(
            self.state.global_step,
            adapter,
            adapter_facts(self.setup),
            state=state,
            trainer_state=state_text(self.state),
            router=None if self.router_term is None else self.router_term.state_dict(),
            best=self.state.best_global_step,
        )

    def _read(self, checkpoint: Path) -> None:
        """Read what transformers does not from a checkpoint, and the routers' state."""
        check_same_factors(self.accelerator.unwrap_model(self.model), checkpoint)
        self._resumed = read_state(checkpoint)
        self._resumed["changed"] = recorded_identity(checkpoint) != self.setup.identity
        self.evaluation_due = self._resumed["evaluation_due"]
        if self.router_term is not None:
            self.router_term.load(checkpoint)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; how often is logged, evaluated and saved is the recipe's, not the checkpoint's."""
        position = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return position

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; on this process's part of a sharded model."""
        optimizer = super().create_optimizer(*args, **kwargs)
        step_on_parts(optimizer)
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The states as they were; rates and decay are the recipe's where a change was allowed."""
        if checkpoint is None:
            return
        groups = [{name: value for name, value in group.items() if name != "params"} for group in self._groups()]
        base_lrs = list(getattr(self._schedule(), "base_lrs", ()))
        load_state(self.optimizer, self._resumed["optimizer"])
        self.lr_scheduler.load_state_dict(self._resumed["scheduler"])
        schedule = self._schedule()
        if not self._resumed["changed"] or not isinstance(schedule, LambdaLR):
            return
        schedule.base_lrs = base_lrs
        for group, fresh, base, share in zip(self._groups(), groups, base_lrs, schedule.lr_lambdas, strict=True):
            group.update(fresh)
            group["lr"] = base * share(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in self._groups()]

    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    def _schedule(self) -> Any:
        return getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None and self._resumed["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(self._resumed["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The generators of this process as they were."""
        rank, ranks = self.accelerator.process_index, self._resumed.get("ranks", ())
        if checkpoint is not None and rank < len(ranks):
            set_rng_state(ranks[rank]["rng"])

    def restore(self) -> None:
        """The sums of the checkpoint, once transformers has set its own to 0."""
        if not self._resumed:
            return
        self.load_own_state(self._own_of(self._resumed["ranks"]), self._resumed["num_tokens"])
        self._total_loss_scalar = self._resumed["loss_sum"]

    def _own_of(self, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        """This process's sums; with another number of processes those of all on the first one."""
        rank, count = self.accelerator.process_index, self.accelerator.num_processes
        first = ranks[0]
        if len(ranks) == count:
            return dict(ranks[rank])
        loss = sum(one["loss"] for one in ranks) / len(ranks)
        window = [sum(values) for values in zip(*(one["window"] for one in ranks), strict=True)]
        return {**first, "loss": loss, "window": window if rank == 0 else [0.0] * len(window)}

    def _evaluate_now(self, checkpoint: Path) -> None:
        """The evaluation that a signal cut short, before anything else; the checkpoint is then written once more.

        It draws from the generators as it would have done then.
        """
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        self._load_rng_state(str(checkpoint))
        self._continue_as_main_process()
        self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
        # accelerate has prepared the model to evaluate, and would not wrap it any more: each process would train alone.
        self.model._is_accelerate_prepared = False
        generators = gather_object([snapshot(rng_state())])
        if len(generators) == len(self._resumed["ranks"]):
            for own, generator in zip(self._resumed["ranks"], generators, strict=True):
                own["rng"] = generator
        self._resumed["evaluation_due"] = self.evaluation_due = False
        adapter = snapshot_adapter(self.accelerator.unwrap_model(self.model), self.setup.base.family)
        if self.saver is not None:
            state = {name: self._resumed[name] for name in self._resumed if name != "changed"}
            self.saver.save(self._snapshot(adapter, state))
            self.saver.wait()
        self.accelerator.wait_for_everyone()

    def _continue_as_main_process(self) -> None:
        """Or not: a checkpoint's state is the main one's, whose callbacks write."""
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.state.is_local_process_zero = self.is_local_process_zero()

    def compare_trainer_and_checkpoint_args(self, *_: Any) -> None:
        """Nothing: the recipes were compared, and transformers would warn of the steps that `save_steps` 0.1 means."""

    def _finish_from(self, checkpoint: Path) -> None:
        """From the checkpoint of the last step: only the line of the run's end is missing."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        self._continue_as_main_process()
        self._total_loss_scalar = self._resumed["loss_sum"] + self._own_of(self._resumed["ranks"])["loss"]
        self.watchdog.load_state_dict(self._own_of(self._resumed["ranks"])["watchdog"])
        self.log({"total_flos": self.state.total_flos, "train_loss": 0.0})


class _Flow(TrainerCallback):  # type: ignore[misc]
    """Restores a continued run, and looks for signals between the steps and in evaluations."""

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer
        self._began, self._first = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.restore()
        self._began, self._first = time.monotonic(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.agreed():
            if not self.trainer.rate_follows_evaluations:
                self.trainer.evaluation_due = control.should_evaluate
                control.should_evaluate = False
            control.should_save = control.should_training_stop = True
        if state.is_world_process_zero and state.global_step - self._first == _MEASURED_STEPS:
            self._say_minutes(state)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if (self.trainer.is_in_train or self.trainer.evaluation_due) and not self.trainer.rate_follows_evaluations:
            self._end_where_asked_for()

    def _end_where_asked_for(self) -> None:
        if self.trainer.agreed():
            raise _EvaluationStoppedError

    def _say_minutes(self, state: Any) -> None:
        """How long a checkpoint is apart from the next, by the first steps; a warning above half an hour."""
        minutes = state.save_steps * (time.monotonic() - self._began) / _MEASURED_STEPS / 60
        line = f"a checkpoint every {state.save_steps:,} steps, about every {minutes:.1f} minutes"
        if minutes > _LONG_MINUTES:
            shorter = max(int(state.save_steps * _LONG_MINUTES / minutes), 1)
            line += f": a killed run loses as much; training.save_steps={shorter} would save twice an hour"
        print(line, flush=True)
