"""TRL's arguments, the optimizer and the schedule of a recipe, built once on one dummy parameter before anything loads.

What they refuse would otherwise stop the run with a traceback once the model is in memory, or hours later. The setting
at fault is found by taking the settings away one by one.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from torch.utils.data import DataLoader
from transformers import Trainer, get_scheduler

from finetune.errors import FinetuneError, Problem, RecipeError
from finetune.methods.arguments import evaluation_metrics, trainer_config
from finetune.recipe import Recipe

_PACKAGES = {
    "adamw_anyprecision": ("torchdistx", "build https://github.com/pytorch/torchdistx"),
    "adamw_torch_4bit": ("torchao", "pip install torchao"),
    "adamw_torch_8bit": ("torchao", "pip install torchao"),
    "grokadamw": ("grokadamw", "pip install grokadamw"),
    "stable_adamw": ("optimi", "pip install torch-optimi"),
}
"""Optimizers of transformers that need a package which this program does not: its module, and how to get it."""

_OPTIM, _SCHEDULER, _ARGUMENTS = "training.optim", "training.lr_scheduler_type", "training.trainer_args"
_SOUND = {_OPTIM: "adamw_torch", _SCHEDULER: "constant"}
_SCHEDULER_NEEDS = {
    "cosine_with_min_lr": '{"min_lr_rate": 0.1}',
    "cosine_warmup_with_min_lr": '{"min_lr_rate": 0.1}',
    "warmup_stable_decay": '{"num_decay_steps": 100}',
}
_OF_A_MACHINE = ("ddp_backend", "tf32")
_OWN_KEYS = {"lr": "training.learning_rate", "weight_decay": "training.weight_decay"}
_ADAM = {"adam_beta1", "adam_beta2", "adam_epsilon"}
_POINTS = 10_000  # of a schedule, at most
_ROUNDING = 1e-6


def check_trainer(recipe: Recipe, num_processes: int | None = None) -> None:
    """Raise RecipeError with every setting that TRL's arguments, the optimizer, the schedule or the loader refuse.

    Also with settings that they would ignore in silence. `num_processes` of the run that starts; None where the run may
    be on another machine: settings that depend on the machine are then left out.
    """
    if num_processes is None:
        recipe = _on_any_machine(recipe)
    problems = [*_missing_package(recipe), *_unknown_metric(recipe), *_backend_of_one(recipe, num_processes)]
    for problem in problems:
        recipe = _without(recipe, problem.where)
    num_processes = num_processes or 1
    while (refusal := _refusal(recipe, num_processes)) is not None:
        problem = _at_fault(recipe, num_processes, refusal)
        problems.append(problem)
        if problem.where not in _removable(recipe):
            break
        recipe = _without(recipe, problem.where)
    else:
        problems += _ignored(recipe, num_processes)
    if problems:
        raise RecipeError(problems)


def _on_any_machine(recipe: Recipe) -> Recipe:
    for name in _OF_A_MACHINE:
        recipe = _without(recipe, f"{_ARGUMENTS}.{name}")
    return recipe


def _missing_package(recipe: Recipe) -> Iterator[Problem]:
    name = recipe.training.optim
    module, install = _PACKAGES.get(name, ("torch", ""))
    if find_spec(module) is None:
        what = f"needs the package {module}, which is not installed"
        yield Problem(_OPTIM, what, f"{install}, or write adamw_torch", name)


def _unknown_metric(recipe: Recipe) -> Iterator[Problem]:
    """A metric that no evaluation reports would stop the run at the first one."""
    given = recipe.training.trainer_args.get("metric_for_best_model")
    if not isinstance(given, str):
        return
    known = evaluation_metrics(recipe.method.kind)
    if given.removeprefix("eval_") not in known:
        where, do = f"{_ARGUMENTS}.metric_for_best_model", f"write one of {', '.join(f'eval_{name}' for name in known)}"
        yield Problem(where, "no evaluation reports this metric", do, given)


def _backend_of_one(recipe: Recipe, num_processes: int | None) -> Iterator[Problem]:
    backend = recipe.training.trainer_args.get("ddp_backend")
    if backend is not None and num_processes == 1:
        yield Problem(f"{_ARGUMENTS}.ddp_backend", "one process has no other to connect to", "remove it", str(backend))


def _removable(recipe: Recipe) -> list[str]:
    """Settings that can be at fault, each with a value without which the rest can still be checked."""
    arguments = [f"{_ARGUMENTS}.{name}" for name in recipe.training.trainer_args]
    return [*arguments, *(key for key, sound in _SOUND.items() if _value(recipe, key) != sound)]


def _value(recipe: Recipe, key: str) -> Any:
    name = key.rpartition(".")[2]
    return recipe.training.trainer_args[name] if key.startswith(_ARGUMENTS) else getattr(recipe.training, name)


def _without(recipe: Recipe, key: str) -> Recipe:
    """The recipe without a field of `trainer_args`, or with a sound value of another setting."""
    name = key.rpartition(".")[2]
    arguments = {
        field: value for field, value in recipe.training.trainer_args.items() if key != f"{_ARGUMENTS}.{field}"
    }
    changes: dict[str, Any] = {name: _SOUND[key]} if key in _SOUND else {"trainer_args": arguments}
    return _with(recipe, **changes)


def _with(recipe: Recipe, **training: Any) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=training)})


def _refusal(recipe: Recipe, num_processes: int) -> str | None:
    """The first line of what the parts of a trainer raise for these settings; None if they take them."""
    try:
        with warnings.catch_warnings(action="ignore"):
            _build(recipe, num_processes)
    except FinetuneError:
        raise
    except Exception as error:  # any error of theirs is about the settings
        return (str(error).strip() or type(error).__name__).splitlines()[0].removesuffix(".")
    return None


def _build(recipe: Recipe, num_processes: int) -> None:
    """What a trainer would make of the settings, and one step of the optimizer."""
    config = _config(recipe, num_processes)
    optimizer = _optimizer(config)
    optimizer.step()
    _schedule(config, optimizer, recipe.training.max_steps or recipe.training.warmup_steps + 1_000_000)
    if config.torch_compile:
        TorchDynamoPlugin(backend=config.torch_compile_backend, mode=config.torch_compile_mode)
    DataLoader(
        [0],  # type: ignore[arg-type]
        num_workers=config.dataloader_num_workers,
        prefetch_factor=config.dataloader_prefetch_factor,
        persistent_workers=config.dataloader_persistent_workers,
        multiprocessing_context=config.dataloader_multiprocessing_context,
    )


def _config(recipe: Recipe, num_processes: int) -> Any:
    with warnings.catch_warnings(action="ignore"):
        return trainer_config(recipe, Path(recipe.output_dir), {"report_to": []}, num_processes)


def _optimizer(config: Any) -> torch.optim.Optimizer:
    """The optimizer on one parameter, in a group with weight decay as the trainer makes it."""
    made, options = Trainer.get_optimizer_cls_and_kwargs(config)
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    optimizer: torch.optim.Optimizer = made([{"params": [parameter], "weight_decay": config.weight_decay}], **options)
    return optimizer


def _schedule(config: Any, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return get_scheduler(
        config.lr_scheduler_type, optimizer, config.get_warmup_steps(steps), steps, config.lr_scheduler_kwargs
    )


def _at_fault(recipe: Recipe, num_processes: int, refusal: str) -> Problem:
    """The refusal, at the first setting without which another one or none comes."""
    for key in _removable(recipe):
        if _refusal(_without(recipe, key), num_processes) != refusal:
            name = str(_value(recipe, key))
            do = "write another value, or remove it"
            if key == _SCHEDULER and name in _SCHEDULER_NEEDS:
                do = f"write {_ARGUMENTS}.lr_scheduler_kwargs, such as '{_SCHEDULER_NEEDS[name]}'"
            return Problem(key, f"refused: {refusal}", do, name)
    return Problem("training", f"refused: {refusal}", "change the settings that it names")


def _ignored(recipe: Recipe, num_processes: int) -> Iterator[Problem]:
    """Settings of the optimizer that it does not read: with another value it is made in the same way."""
    arguments, name = recipe.training.trainer_args, recipe.training.optim
    for field in _ADAM & arguments.keys():
        if not _reads(recipe, {field: 0.5 if arguments[field] != 0.5 else 0.25}, num_processes):
            what = f"the optimizer {name} does not use it"
            yield Problem(f"{_ARGUMENTS}.{field}", what, "remove it", str(arguments[field]))
    where = f"{_ARGUMENTS}.optim_args"
    options = [option.strip() for option in str(arguments.get("optim_args") or "").split(",") if option]
    for option in options:
        key = option.partition("=")[0].strip()
        # A value may be the default, and an unknown one be taken for false.
        others = [other for other in options if other != option]
        unlike = [",".join(others), ",".join([*others, f"{key}=unknown"])]
        if key in _OWN_KEYS:
            yield Problem(where, "the recipe has its own key for this", f"remove it and write {_OWN_KEYS[key]}", option)
        elif not any(_reads(recipe, {"optim_args": text}, num_processes) for text in unlike):
            yield Problem(where, f"the optimizer {name} has no option {key}", "remove it", option)
    if (modules := arguments.get("optim_target_modules")) is not None:
        what = "only the optimizers galore and apollo use it, which cannot train an adapter"
        yield Problem(f"{_ARGUMENTS}.optim_target_modules", what, "remove it", str(modules))


def _reads(recipe: Recipe, other: dict[str, Any], num_processes: int) -> bool:
    """Whether other values in `trainer_args` make another optimizer, or none."""
    changed = _with(recipe, trainer_args=recipe.training.trainer_args | other)
    kwargs = [Trainer.get_optimizer_cls_and_kwargs(_config(recipe, num_processes))[1]]
    try:
        kwargs.append(Trainer.get_optimizer_cls_and_kwargs(_config(changed, num_processes))[1])
    except (ValueError, AttributeError):  # the other value, not a number or a name, was read
        return True
    return bool(kwargs[0] != kwargs[1])


@dataclass(frozen=True)
class _Rates:
    """The learning rate over the run, as shares of the recipe's."""

    lowest: float
    highest: float


def _rates(config: Any, steps: int) -> _Rates:
    """The schedule at up to 10,000 of its steps. Raises what the schedule raises.

    Where evaluations decide the rate: its start, and the lowest value that they may set.
    """
    schedule = _schedule(config, _optimizer(config), steps)
    lambdas = getattr(schedule, "lr_lambdas", None)
    if lambdas is None:
        return _Rates(0.0, max(1.0, *(lowest / config.learning_rate for lowest in schedule.min_lrs)))
    shares = [float(lambdas[0](step)) for step in range(0, steps, max(1, steps // _POINTS))]
    return _Rates(min(shares), max(shares))


def check_schedule(recipe: Recipe, steps: int, num_processes: int | None = None) -> list[str]:
    """Warm-up, evaluations and checkpoints held against the number of steps: sentences where they do not fit.

    `steps`: optimizer steps of the run; `num_processes` as in `check_trainer`. Raises RecipeError for a schedule that
    goes above the recipe's rate or below 0, or whose rate is 0 in every step.
    """
    config = _config(recipe if num_processes else _on_any_machine(recipe), num_processes or 1)
    where = f"{_ARGUMENTS}.lr_scheduler_kwargs" if config.lr_scheduler_kwargs else _SCHEDULER
    try:
        rates = _rates(config, steps)
    except (TypeError, ValueError, ArithmeticError) as error:
        what = f"the schedule has no rate for each of the run's {steps} steps: {error}"
        raise RecipeError(Problem(where, what, "write other values", recipe.training.lr_scheduler_type)) from error
    _check_rates(rates, recipe, where, steps)
    return [*_remarks(recipe, steps, rates.highest)]


def _remarks(recipe: Recipe, steps: int, highest: float) -> Iterator[str]:
    training = recipe.training
    of_the_run = f"of a run of {_steps(steps)}"
    if highest < 1 - _ROUNDING:
        reached = f"the rate reaches {highest * training.learning_rate:.3g}, not {training.learning_rate:g}"
        yield f"training.warmup_steps: {training.warmup_steps:,} {of_the_run}: {reached}"
    if recipe.data.eval is not None and training.eval_steps is not None and training.eval_steps > steps:
        yield f"training.eval_steps: {training.eval_steps:,} {of_the_run}: the only evaluation is at the end"
    evaluates = recipe.data.eval is not None and training.eval_steps is not None and training.eval_steps < steps
    if training.save_steps is not None and training.save_steps > steps and not evaluates:  # the best one is saved
        yield f"training.save_steps: {training.save_steps:,} {of_the_run}: there is no checkpoint before the end"


def _steps(count: int) -> str:
    return f"{count:,} step{'' if count == 1 else 's'}"


def _check_rates(rates: _Rates, recipe: Recipe, where: str, steps: int) -> None:
    rate = recipe.training.learning_rate
    if rates.highest > 1 + _ROUNDING or not math.isfinite(rates.highest):
        what, got = f"the schedule rises above training.learning_rate {rate:g}", f"up to {rates.highest * rate:g}"
        raise RecipeError(Problem(where, what, "write lower values, or a higher rate", got))
    if rates.lowest < -_ROUNDING:
        got = f"down to {rates.lowest * rate:g}"
        raise RecipeError(Problem(where, "the schedule falls below 0", "write other values", got))
    if rates.highest <= 0:
        what = f"the rate is 0 in {'the only step' if steps == 1 else f'all {steps:,} steps'}: nothing would be trained"
        got = str(recipe.training.warmup_steps)
        raise RecipeError(Problem("training.warmup_steps", what, "write 0, or give the run more steps", got))
