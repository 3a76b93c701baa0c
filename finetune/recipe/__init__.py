"""YAML -> frozen, validated settings, before torch is imported."""

from finetune.recipe.data_settings import DataSettings, DataSource
from finetune.recipe.fields import json_schema
from finetune.recipe.load import dump_recipe, load_recipe
from finetune.recipe.method_settings import DpoSettings, SftSettings
from finetune.recipe.reference import reference
from finetune.recipe.settings import (
    LoggingSettings,
    LoraSettings,
    ModelSettings,
    Recipe,
    RouterSettings,
    TrainingSettings,
)
from finetune.recipe.targets import FRIENDLY_TARGETS

__all__ = [
    "FRIENDLY_TARGETS",
    "DataSettings",
    "DataSource",
    "DpoSettings",
    "LoggingSettings",
    "LoraSettings",
    "ModelSettings",
    "Recipe",
    "RouterSettings",
    "SftSettings",
    "TrainingSettings",
    "dump_recipe",
    "json_schema",
    "load_recipe",
    "reference",
]
