"""Tiny bases and adapters in memory, by the product's own code, without a recipe's data section."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoConfig

from finetune.adapters.record import BaseRecord
from finetune.base import Base, check_loads
from finetune.checkpoint import CheckpointReader
from finetune.model import load_base
from finetune.moe.families import FAMILIES, family_of
from finetune.moe.lora import add_adapter
from finetune.recipe import LoraSettings, ModelSettings

FINGERPRINT = "0123"


def base_at(folder: Path, settings: ModelSettings, new_tokens: Sequence[int] = ()) -> Base:
    """The record of a base that would load, without its tokenizer."""
    reader = CheckpointReader(folder)
    family = family_of(str(reader.config["model_type"]), str(folder))
    check_loads(reader, family, settings)
    provenance = BaseRecord(name_or_path=settings.name_or_path, fingerprint=FINGERPRINT)
    return Base(folder, family, AutoConfig.from_pretrained(folder), None, tuple(new_tokens), provenance)


def load_folder(folder: Path, settings: ModelSettings, new_tokens: Sequence[int] = ()) -> Any:
    """The base model in a folder, as a run loads it."""
    return load_base(base_at(folder, settings, new_tokens), settings)


def with_lora(model: Any, lora: LoraSettings, new_tokens: Sequence[int] = ()) -> PeftModel:
    """A loaded model with a fresh adapter."""
    return add_adapter(model, FAMILIES[model.config.model_type], lora, new_tokens)
