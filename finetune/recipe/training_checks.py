"""Checks of `training`: optimizer, schedule, evaluations, and the fields of TRL's settings in `trainer_args`."""

import json
from collections.abc import Iterable
from typing import Any

from finetune.recipe.error_messages import closest, unless_given
from finetune.recipe.other_tools import FOREIGN
from finetune.recipe.schema import settings
from finetune.recipe.section_checks import key_path, read
from finetune.recipe.source import Source, show
from finetune.recipe.trainer_args import (
    AT_LEAST,
    CHOICES,
    OPTIMIZERS,
    PASSED,
    REFUSED_OPTIMIZERS,
    TRAINER_CONFIGS,
    reserved,
)
from finetune.recipe.yaml import Path

_ARGUMENTS = key_path("training.trainer_args")
BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")
"""Schedulers that change the rate after an evaluation and have no warm-up."""
_WITHOUT_KWARGS = ("constant", "constant_with_warmup")
_BY_LENGTH = ("group_by_length", "batch_rebalance")


def check_training(source: Source) -> None:
    """Run every check of `training` but its length and its batches; all problems end in `source`."""
    for check in (_warmup, _evaluation, _optimizer, _scheduler, _trainer_args, _text_arguments, _early_stopping):
        check(source)


def _warmup(source: Source) -> None:
    where = key_path("training.warmup_steps")
    warmup, scheduler = read(source, "training.warmup_steps", int), read(source, "training.lr_scheduler_type", str)
    if warmup and scheduler in ("constant", *BY_EVALUATION):
        other = "constant_with_warmup" if scheduler == "constant" else "another scheduler"
        do = f"write lr_scheduler_type: {other}, or remove warmup_steps"
        source.report(where, f"the scheduler `{scheduler}` ignores it", do, got=show(warmup))


def _evaluation(source: Source) -> None:
    steps = read(source, "training.eval_steps", int)
    if steps and source.get(key_path("data.eval")) is None and not source.is_broken(key_path("data.eval")):
        do = "add data.eval with path (or id) and format, or remove eval_steps"
        source.report(key_path("training.eval_steps"), "there is no data to evaluate on", do, got=show(steps))


def _evaluates(source: Source) -> bool:
    """Whether the run evaluates before its end; True where that cannot be told."""
    keys = (key_path("data.eval"), key_path("training.eval_steps"))
    return any(source.is_broken(key) for key in keys) or all(source.get(key) for key in keys)


def _optimizer(source: Source) -> None:
    name, where = read(source, "training.optim", str), key_path("training.optim")
    if name in REFUSED_OPTIMIZERS:
        source.report(where, REFUSED_OPTIMIZERS[name], "write adamw_torch or another optimizer", got=show(name))
    elif name and name not in OPTIMIZERS:
        close = closest(name, OPTIMIZERS)
        do = f"did you mean {close}?" if close else "write one of " + ", ".join(OPTIMIZERS)
        source.report(where, "transformers has no such optimizer", do, got=show(name))


def _scheduler(source: Source) -> None:
    name, where = read(source, "training.lr_scheduler_type", str), key_path("training.lr_scheduler_type")
    if name in BY_EVALUATION and not _evaluates(source):
        do = "add data.eval and training.eval_steps, or write another scheduler"
        source.report(where, "lets evaluations change the rate, and there are none", do, got=show(name))
    given = _argument(source, "lr_scheduler_kwargs")
    if name in _WITHOUT_KWARGS and given:
        what = f"the scheduler `{name}` takes none"
        do = "remove it, or write another training.lr_scheduler_type"
        source.report((*_ARGUMENTS, "lr_scheduler_kwargs"), what, do, got=show(given))


def _argument(source: Source, name: str) -> Any:
    """A field of `trainer_args` as typed, None where it is not given or was reported."""
    where = (*_ARGUMENTS, name)
    return None if source.is_broken(where) else source.get(where)


def _trainer_args(source: Source) -> None:
    arguments = source.get(_ARGUMENTS)
    if not isinstance(arguments, dict) or not arguments:
        return
    kind = read(source, "method.kind", str) or ""
    if kind not in TRAINER_CONFIGS:
        return
    config, own = TRAINER_CONFIGS[kind], reserved(kind)
    for name, value in arguments.items():
        where = (*_ARGUMENTS, name)
        if name in own:
            what, do = own[name]
            source.report(where, what, unless_given(source, do, where), got=show(value))
        elif name not in PASSED:
            what, do = _unknown_argument(name, {*PASSED, *own}, config)
            source.report(where, what, unless_given(source, do, where), got=show(value))
        elif not PASSED[name].takes(value):
            do = f"write a value of {config}'s type: {PASSED[name].annotation}"
            source.report(where, "wrong type", do, got=show(value))
        else:
            _value(source, where, name, value)


def _value(source: Source, where: Path, name: str, value: Any) -> None:
    """Values of the right type that the trainer would misread, or stop at in the middle of the run."""
    if name in CHOICES and isinstance(value, str) and value not in CHOICES[name]:
        source.report(where, "no such value", f"write one of {', '.join(CHOICES[name])}", got=show(value))
    if name in AT_LEAST and value is not None and value < AT_LEAST[name]:
        source.report(where, "out of range", f"write a number of at least {AT_LEAST[name]}", got=show(value))
    if name == "train_sampling_strategy" and value in _BY_LENGTH and read(source, "method.kind", str) == "dpo":
        what = "pairs of answers have no single length to group them by"
        source.report(where, what, "write random or sequential, or remove it", got=show(value))
    if name == "eval_on_start" and value and not source.get(key_path("data.eval")):
        source.report(where, "there is no data to evaluate on", "add data.eval, or remove it", got=show(value))


def _unknown_argument(name: str, fields: Iterable[str], config: str) -> tuple[str, str]:
    if name in FOREIGN:
        return FOREIGN[name].what, FOREIGN[name].do
    elsewhere = [path for path in settings() if path.rpartition(".")[2] == name]
    if elsewhere:
        return "the recipe has this key itself", "write " + " or ".join(elsewhere)
    close = closest(name, sorted(fields))
    do = f"did you mean {close}?" if close else f"write one of {config}'s fields"
    return f"{config} has no such field", do


def _text_arguments(source: Source) -> None:
    """Fields whose text must be of a form that transformers parses."""
    options, kwargs = _argument(source, "optim_args"), _argument(source, "lr_scheduler_kwargs")
    if isinstance(options, str) and options and any(part.count("=") != 1 for part in options.split(",")):
        do = "write name=value, several with commas between them"
        source.report((*_ARGUMENTS, "optim_args"), "not a list of name=value", do, got=show(options))
    if isinstance(kwargs, str) and not _is_json_object(kwargs):
        do = """write JSON in single quotes, such as '{"min_lr_rate": 0.1}'"""
        source.report((*_ARGUMENTS, "lr_scheduler_kwargs"), "not the JSON text of a mapping", do, got=show(kwargs))


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict) and text.startswith("{")
    except ValueError:
        return False


def _early_stopping(source: Source) -> None:
    """Without evaluations before the end nothing would ever stop the run."""
    patience = read(source, "training.early_stopping_patience", int)
    if patience and not _evaluates(source):
        where, do = key_path("training.early_stopping_patience"), "add data.eval and training.eval_steps, or remove it"
        source.report(where, "no evaluation before the end would stop the run", do, got=show(patience))
