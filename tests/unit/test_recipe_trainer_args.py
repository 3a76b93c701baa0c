"""The lists of the trainer's fields, against the installed TRL and transformers."""

import dataclasses
import typing
from types import NoneType

import pytest
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl import DPOConfig, SFTConfig

from finetune.recipe.settings import Scheduler
from finetune.recipe.trainer_args import AT_LEAST, CHOICES, OPTIMIZERS, PASSED, TRAINER_CONFIGS, reserved

CONFIGS = {"sft": SFTConfig, "dpo": DPOConfig}
SCALARS: dict[object, set[type]] = {bool: {bool}, int: {int}, float: {int, float}, str: {str}, NoneType: {NoneType}}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_of_the_installed_config_is_passed_on_or_reserved(kind: str) -> None:
    """A new field of TRL must be decided on: pass it on, or reserve it."""
    installed = {field.name for field in dataclasses.fields(CONFIGS[kind])}
    assert TRAINER_CONFIGS[kind] == CONFIGS[kind].__name__
    assert installed - PASSED.keys() - reserved(kind).keys() == set(), "new in TRL: add them to trainer_args.py"
    assert PASSED.keys() - installed == set(), "no longer in TRL: remove them from trainer_args.py"
    assert PASSED.keys() & reserved(kind).keys() == set(), "passed on and reserved"


def test_every_reserved_name_is_a_field() -> None:
    installed = {field.name for config in CONFIGS.values() for field in dataclasses.fields(config)}
    assert (reserved("sft").keys() | reserved("dpo").keys()) - installed == set(), "no longer in TRL"


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_field_takes_the_scalars_of_its_annotation(kind: str) -> None:
    types = {field.name: field.type for field in dataclasses.fields(CONFIGS[kind])}
    for name in PASSED.keys() & types.keys():
        field = PASSED[name]
        options = typing.get_args(types[name]) if field.annotation.count("|") else (types[name],)
        scalars = {scalar for option in options for scalar in SCALARS.get(option, {str})}
        assert set(field.accepts) == scalars, f"{name} has another type in TRL: {types[name]}"


def test_the_optimizers_are_those_of_the_installed_transformers() -> None:
    assert set(OPTIMIZERS) == {name.value for name in OptimizerNames}


def test_the_schedulers_are_those_of_the_installed_transformers() -> None:
    assert set(typing.get_args(Scheduler)) == {name.value for name in SchedulerType}


def test_the_choices_are_those_that_transformers_documents() -> None:
    fields = {field.name: field for field in dataclasses.fields(SFTConfig)}
    assert (CHOICES.keys() | AT_LEAST.keys()) <= PASSED.keys()
    for name, choices in CHOICES.items():
        documented = fields[name].metadata.get("choices")
        assert documented is None or set(choices) == set(documented), name
