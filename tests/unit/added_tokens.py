"""A template with two marks that the tiny tokenizer lacks, and models with rows for them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from finetune.adapters.record import BaseRecord
from finetune.data import load_tokenizer
from finetune.model import save_adapter, snapshot_adapter
from finetune.recipe import ModelSettings, Recipe
from tests.bases import base_at, load_folder, with_lora
from tests.support import save_tiny_mixtral, tiny_tokenizer

MARKS = ["<|turn|>", "<|over|>"]
KNOWN = len(tiny_tokenizer())
NEW = [KNOWN, KNOWN + 1]
IDS = torch.tensor([[NEW[0], 40, 41, NEW[1], 42, 43, NEW[0], 44, NEW[1], 45]])
TURNS = (
    "{% for message in messages %}{{ '<|turn|>' + message['role'] + '\\n' + message['content'] + '<|over|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"
)
# A base whose embedding ends with its vocabulary, one that is tied, and one with rows to spare.
BASES: dict[str, dict[str, Any]] = {
    "untied": {"vocab_size": KNOWN},
    "tied": {"vocab_size": KNOWN, "tie_word_embeddings": True},
    "one row to spare": {"vocab_size": KNOWN + 1},
    "rows to spare": {"vocab_size": 512},
}


def settings(base: Path, load_in_4bit: bool = True, dtype: str = "float32") -> ModelSettings:
    """The recipe's model section with the two marks."""
    return ModelSettings(
        name_or_path=str(base),
        load_in_4bit=load_in_4bit,
        dtype=dtype,  # type: ignore[arg-type]
        added_tokens=MARKS,
        eos_token=MARKS[1],
    )


def recipe_for(base: Path, template: Path, **training: Any) -> Recipe:
    """Four steps on rows.jsonl, everything adapted."""
    template.write_text(TURNS, encoding="utf-8")
    return Recipe.model_validate(
        {
            "output_dir": "run",
            "model": settings(base).model_dump(),
            "lora": {"targets": ["attention", "experts"], "r": 4, "lora_alpha": 8.0},
            "router": {"router_aux_loss_coef": 0.1},
            "method": {"kind": "sft"},
            "data": {
                "train": {"path": "rows.jsonl", "format": "prompt_completion"},
                "max_length": 128,
                "chat_template": str(template),
            },
            "training": {"max_steps": 4, "learning_rate": 0.01, "global_batch_size": 8, **training},
        }
    )


def trained(recipe: Recipe, seed: int = 0) -> PeftModel:
    """An adapted model with rows of its own, all of it random, as after some training."""
    torch.manual_seed(seed)
    base = load_folder(Path(recipe.model.name_or_path), recipe.model, NEW)
    model = with_lora(base, recipe.lora, NEW)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def saved(recipe: Recipe, folder: Path, fingerprint: str, seed: int = 0) -> Path:
    """The adapter folder of a run: adapter, record and tokenizer."""
    base = base_at(Path(recipe.model.name_or_path), recipe.model, NEW)
    base = replace(base, provenance=BaseRecord(name_or_path=recipe.model.name_or_path, fingerprint=fingerprint))
    save_adapter(snapshot_adapter(trained(recipe, seed), base.family), folder, recipe, base)
    template = recipe.data.chat_template
    load_tokenizer(recipe.model.name_or_path, None, template, MARKS, MARKS[1]).save_pretrained(folder)
    return folder


def base_of(folder: Path, kind: str, dtype: str = "float32") -> Path:
    """One of BASES on disk."""
    return save_tiny_mixtral(folder, dtype, **BASES[kind])
