"""YAML -> frozen, validated settings, before torch is imported."""

from finetune.recipe.load import dump_recipe, load_recipe
from finetune.recipe.lora_targets import FRIENDLY_TARGETS
from finetune.recipe.method_settings import DpoSettings, SftSettings
from finetune.recipe.schema import json_schema, reference
from finetune.recipe.settings import (
    DataSettings,
    DataSource,
    LoggingSettings,
    LoraSettings,
    ModelSettings,
    Recipe,
    RouterSettings,
    TrainingSettings,
)

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
