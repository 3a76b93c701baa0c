"""The trainer's fields as read from its source, against the trainer itself."""

import dataclasses

from transformers.training_args import OptimizerNames
from trl import SFTConfig

from finetune.recipe.reserved import RESERVED
from finetune.recipe.trainer_fields import optimizer_names, trainer_fields


def test_the_fields_are_those_of_the_installed_sft_config() -> None:
    assert set(trainer_fields()) == {field.name for field in dataclasses.fields(SFTConfig)}


def test_the_optimizers_are_those_of_the_installed_transformers() -> None:
    assert optimizer_names() == {name.value for name in OptimizerNames}


def test_every_reserved_name_is_a_field() -> None:
    assert set(RESERVED) <= set(trainer_fields())
