"""The base of a run: a checkpoint that the recipe fits and that would load, read once and handed on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from finetune.adapters.lineage import made_from
from finetune.adapters.record import BaseRecord
from finetune.checkpoint import (
    CheckpointReader,
    differing_settings,
    fingerprint,
    forward_settings,
    read_json,
    resolve_checkpoint,
    verify_sums,
)
from finetune.data.tokenizer import added_ids, load_tokenizer
from finetune.errors import Problem, RecipeError
from finetune.model_files import load_config, read_config, vocabulary_size
from finetune.moe.experts import EXPERTS_IMPLEMENTATION
from finetune.moe.families import Family, family_of
from finetune.moe.lora import check_targets, check_vocabulary, lora_config
from finetune.moe.preflight import check_layers, check_loadable, check_router_term
from finetune.moe.router_bias import require_biases
from finetune.recipe import FRIENDLY_TARGETS, ModelSettings, Recipe
from finetune.run import Change, RunFolder


@dataclass(frozen=True)
class Base:
    """A base checkpoint. `config` is transformers' configuration, `tokenizer` the one that the recipe asks for,
    `new_tokens` the ids of the tokens that the recipe adds, `provenance` its name and fingerprint (`finetune.json`)."""

    folder: Path
    family: Family
    config: Any
    tokenizer: Any
    new_tokens: tuple[int, ...]
    provenance: BaseRecord


def read_base(recipe: Recipe) -> Base:
    """Everything about the recipe's base except its weights.

    Raises RecipeError or WeightsError where recipe and checkpoint do not fit, or the checkpoint would not load.
    """
    folder = resolve_checkpoint(recipe.model.name_or_path, recipe.model.revision)
    family = checkpoint_family(folder, recipe)
    tokenizer, new_tokens = recipe_tokenizer(folder, recipe)
    provenance = _provenance(folder, recipe.model.name_or_path)
    return Base(folder, family, load_config(folder), tokenizer, tuple(new_tokens), provenance)


def _provenance(folder: Path, name: str) -> BaseRecord:
    """Name and fingerprint (one process computes it for all); for a merged checkpoint also what it was made from."""
    digests = [""]
    if PartialState().is_main_process:
        verify_sums(folder)
        digests = [fingerprint(folder)]
    digest = broadcast_object_list(digests)[0]
    sources = made_from(folder, digest)
    record = {"name_or_path": name, "fingerprint": digest, "config": forward_settings(folder)}
    return BaseRecord.model_validate(record if sources is None else {**record, "made_from": sources})


def base_changes(base: Base, run: RunFolder) -> list[Change]:
    """What differs where the base has other weights or another forward than the one that the run started with."""
    if not run.provenance.exists():
        return []
    before, now = BaseRecord.model_validate(read_json(run.provenance)["base"]), base.provenance
    key, name = "model.name_or_path", before.name_or_path
    if before.fingerprint not in (None, now.fingerprint):
        marks = [str(record.fingerprint)[:12] for record in (before, now)]
        return [
            Change(
                key, f"{name} with the fingerprint {marks[0]}", f"{now.name_or_path} with the fingerprint {marks[1]}"
            )
        ]
    if changed := differing_settings(before.config, now.config or {}):
        return [Change(key, f"{name} with another config.json", "; ".join(changed))]
    return []


def checkpoint_family(folder: Path, recipe: Recipe) -> Family:
    """The checkpoint's architecture. Reads headers, no weights.

    Raises RecipeError where the recipe does not fit it, WeightsError where the checkpoint would not load.
    """
    config, family = _architecture(folder)  # before its files: an unsupported architecture is not helped by others
    reader = CheckpointReader(folder)
    check_layers(reader)
    _check_fit(folder, recipe, config, family, partial(_check_targets, reader))
    check_loads(reader, family, recipe.model)
    return family


def _architecture(folder: Path) -> tuple[dict[str, Any], Family]:
    """`config.json`, and the architecture that it names."""
    config = read_config(folder)
    return config, family_of(str(config.get("model_type")), str(folder / "config.json"))


def check_loads(reader: CheckpointReader, family: Family, settings: ModelSettings) -> None:
    """Preflight: raise WeightsError, before any weight is read, where the checkpoint would not load."""
    check_loadable(reader, family.transformers_class(), settings.load_in_4bit, **loading_options(settings))


def config_family(folder: Path, recipe: Recipe) -> Family:
    """The architecture, from `config.json` alone. Raises RecipeError where the recipe does not fit it."""
    config, family = _architecture(folder)
    _check_fit(folder, recipe, config, family)
    return family


def _check_fit(
    folder: Path, recipe: Recipe, config: dict[str, Any], family: Family, *further: Callable[[Family, Recipe], None]
) -> None:
    """Raise RecipeError with everything in which the recipe does not fit the architecture."""
    checks: list[Callable[[Family, Recipe], None]] = [_check_router_section, _check_bias_balance, *further]
    checks += [_check_attention, _check_packing, partial(_check_length, config)]
    problems: list[Problem] = []
    for check in checks:
        try:
            check(family, recipe)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    check_router_term(folder, family, recipe)


def _check_router_section(family: Family, recipe: Recipe) -> None:
    """The recipe has a router section exactly if the model has routers."""
    if family.moe is not None and recipe.router is None:
        raise RecipeError(
            Problem(
                "router",
                f"{family.model_type} is a Mixture-of-Experts model and the recipe has no router section",
                "add router.router_aux_loss_coef (0 turns the balance term off; the checkpoint's own is never used)",
            )
        )
    if family.moe is None and recipe.router is not None:
        raise RecipeError(
            Problem("router", f"{family.model_type} is a dense model without a router", "remove the router section")
        )


def _check_bias_balance(family: Family, recipe: Recipe) -> None:
    """`bias_update_rate` needs an architecture with correction biases."""
    if family.moe is not None and recipe.router is not None and recipe.router.bias_update_rate:
        require_biases(family, recipe.router.bias_update_rate)


def _check_targets(reader: CheckpointReader, family: Family, recipe: Recipe) -> None:
    """The modules that `lora.targets` names must exist."""
    lora_config(recipe.lora, family)
    on_disk = [key.removesuffix(".weight") for key in reader.keys]  # linear modules have the same names as in the model
    check_targets(set(recipe.lora.targets) & set(FRIENDLY_TARGETS), family, on_disk)


def _check_packing(family: Family, recipe: Recipe) -> None:
    if family.unpackable and recipe.data.packing:
        what = f"rows of {family.model_type} cannot be packed: {family.unpackable}"
        raise RecipeError(Problem("data.packing", what, "write packing: false", got="true"))


def _check_length(config: dict[str, Any], family: Family, recipe: Recipe) -> None:
    """No row may be longer than the model's positions reach; each packed row counts from 0."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int):
        return
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    before, factor = (rope.get(name) for name in ("original_max_position_embeddings", "factor"))
    reach = max(positions, int((before or positions) * (factor or 1)))
    if recipe.data.max_length > reach:
        what = f"longer than the {reach} positions of this {family.model_type} (max_position_embeddings)"
        do = f"write at most {reach}, or use a checkpoint whose config.json says how it is stretched further"
        raise RecipeError(Problem("data.max_length", what, do, got=str(recipe.data.max_length)))


def _check_attention(family: Family, recipe: Recipe) -> None:
    """The attention implementation must be one that the architecture has, and be installed."""
    where, name = "model.attn_implementation", recipe.model.attn_implementation
    if name not in family.attn_implementations:
        do = f"write {' or '.join(family.attn_implementations)}"
        raise RecipeError(Problem(where, f"{family.model_type} has no such attention code", do, got=name))
    if name == "flash_attention_2" and find_spec("flash_attn") is None:
        raise RecipeError(
            Problem(where, "the package flash_attn is not installed", "install it, or use sdpa", got=name)
        )


def loading_options(settings: ModelSettings) -> dict[str, Any]:
    """Arguments of `from_pretrained` that decide which modules are built."""
    return {
        "dtype": getattr(torch, settings.dtype),
        "attn_implementation": settings.attn_implementation,
        "experts_implementation": EXPERTS_IMPLEMENTATION,
    }


def recipe_tokenizer(folder: Path, recipe: Recipe) -> tuple[Any, list[int]]:
    """The checkpoint's tokenizer with the recipe's chat template and added tokens, and the ids of those tokens.

    Raises what `load_tokenizer` raises, and WeightsError where the tokenizer has ids beyond the embedding's rows.
    """
    settings = recipe.model
    tokenizer = load_tokenizer(
        str(folder),
        None,
        recipe.data.chat_template,
        settings.added_tokens,
        settings.eos_token,
        settings.pad_token,
        recipe.data.template_args,
    )
    new_tokens = added_ids(tokenizer, settings.added_tokens)
    rows = vocabulary_size(folder)
    check_vocabulary(rows, max(tokenizer.get_vocab().values()), len(new_tokens), str(folder))
    return tokenizer, new_tokens
