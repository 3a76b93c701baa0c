"""The trainer's fields as read from its source, against the trainer itself."""

import dataclasses

import pytest
from transformers.training_args import OptimizerNames
from trl import DPOConfig, SFTConfig

from finetune.recipe.reserved import reserved
from finetune.recipe.trainer_fields import TRAINER_CONFIGS, optimizer_names, trainer_fields


@pytest.mark.parametrize(("kind", "config"), [("sft", SFTConfig), ("dpo", DPOConfig)])
def test_the_fields_are_those_of_the_installed_config(kind: str, config: type) -> None:
    assert set(trainer_fields(kind)) == {field.name for field in dataclasses.fields(config)}
    assert TRAINER_CONFIGS[kind] == config.__name__


def test_the_optimizers_are_those_of_the_installed_transformers() -> None:
    assert optimizer_names() == {name.value for name in OptimizerNames}


def test_every_reserved_name_is_a_field() -> None:
    assert set(reserved("sft")) <= set(trainer_fields("sft"))
    assert set(reserved("dpo")) <= set(trainer_fields("dpo")) | set(reserved("sft"))


def test_no_field_that_only_dpo_has_is_left_to_chance() -> None:
    """Each is a key of the recipe, or set by the trainer; a new one of TRL must be decided on."""
    only = set(trainer_fields("dpo")) - set(trainer_fields("sft"))
    assert only <= set(reserved("dpo"))
