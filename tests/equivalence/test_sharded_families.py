"""A model sharded over two or three processes computes what it computes whole, in every architecture.

One forward and backward on the same tokens: loss, gradients, the adapter as it is saved, and the bytes that a process
holds and reads.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.base import read_base
from finetune.model import adapt, load_base, snapshot_adapter
from finetune.moe.audit import audit_model, check_audit
from finetune.moe.families import FAMILIES
from finetune.moe.nf4 import Nf4Part
from finetune.moe.sharding import shard_model, share_of_this_process, whole
from finetune.parallelism import Parallelism
from finetune.recipe import Recipe
from tests.equivalence.ranks import on_ranks
from tests.families import CONFIGS, save_tiny

TOKENS = torch.randint(4, 300, (2, 16), generator=torch.Generator().manual_seed(1))


def recipe_of(base: Path, is_moe: bool, **model: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "output_dir": str(base.parent / "run"),
            "model": {
                "name_or_path": str(base),
                "load_in_4bit": True,
                "dtype": "float32",
                "attn_implementation": FAMILIES[base.name].attn_implementations[0],
                **model,
            },
            "lora": {"targets": ["attention", "experts" if is_moe else "mlp"], "r": 4, "lora_alpha": 8.0},
            "router": {"router_aux_loss_coef": 0.0} if is_moe else None,
            "method": {"kind": "sft"},
            "data": {"train": {"path": "none.jsonl", "format": "text"}, "max_length": 64},
            "training": {
                "max_steps": 1,
                "learning_rate": 0.01,
                "global_batch_size": 2,
                "per_device_train_batch_size": 2,
                "gradient_checkpointing": "selective",
            },
        }
    )


def loss_and_gradients(recipe: Recipe, parallelism: Parallelism) -> tuple[Any, float, dict[str, torch.Tensor]]:
    """The adapted model, its loss and the whole gradient of every trained parameter."""
    base = read_base(recipe)
    torch.manual_seed(0)
    share = share_of_this_process(parallelism)
    model = adapt(load_base(base, recipe.model, share), base, recipe)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    if share is not None:
        check_reads(model, parallelism)
        shard_model(model, base.family, parallelism)
    parts = audit_model(model, base.family)
    check_audit(parts, recipe)
    if share is not None:
        for part in (parts[name] for name in ("attention", "experts") if parts[name].bytes):
            assert part.local_bytes <= part.bytes / parallelism.shard * 1.01 + 64 * len(part.weights), part.part
    loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
    loss.backward()
    gradients = {name: whole(each.grad) for name, each in model.named_parameters() if each.requires_grad}
    saved = snapshot_adapter(model, base.family).factors
    return model, loss.item(), {**gradients, **{f"saved {name}": value for name, value in saved.items()}}


def check_reads(model: torch.nn.Module, parallelism: Parallelism) -> None:
    """A process reads and quantises its part of each stack's experts, and at most two more."""
    for parameter in model.parameters():
        if isinstance(parameter.data, Nf4Part):
            assert len(parameter.data.held) <= math.floor(parameter.shape[0] / parallelism.shard) + 2


def compare(base: Path, count: int) -> None:
    recipe = recipe_of(base, FAMILIES[base.name].moe is not None)
    _, loss, values = loss_and_gradients(recipe, Parallelism(count, 1))
    _, sharded_loss, sharded = loss_and_gradients(recipe, Parallelism(count, count))
    assert abs(loss - sharded_loss) <= 1e-6
    assert values.keys() == sharded.keys()
    assert any(value.abs().max() > 1e-4 for name, value in values.items() if not name.startswith("saved"))
    for name, value in values.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-5, atol=1e-6, msg=name)


ALWAYS = ("mixtral", "deepseek_v3", "gpt_oss")


@pytest.mark.parametrize(
    "family", [each if each in ALWAYS else pytest.param(each, marks=pytest.mark.faults) for each in CONFIGS]
)
def test_a_sharded_model_computes_what_it_computes_whole(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / family)
    on_ranks(
        3 if family == "mixtral" else 2, compare, tmp_path / family, 3 if family == "mixtral" else 2, folder=tmp_path
    )
