"""The base model and its adapter in memory, and the adapter on disk."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel

import finetune
from finetune.adapters.adapter import CONFIG_FILE, adapter_digest, deciding_settings
from finetune.adapters.initial import InitialAdapter
from finetune.adapters.record import EXPERT_LAYOUT, FORMAT, AdapterRecord, FactorLayout, InitialRecord
from finetune.base import Base, loading_options
from finetune.checkpoint import read_json
from finetune.errors import WeightsError
from finetune.model_files import check_model_folder, reading
from finetune.moe.checkpointing import enable_checkpointing
from finetune.moe.esft import ExpertChoice, keep_chosen
from finetune.moe.families import Family
from finetune.moe.lora import add_adapter, grow_vocabulary
from finetune.moe.nf4_loading import MoeNf4Config, check_weights
from finetune.moe.preflight import differences
from finetune.moe.router_bias import BIAS_FILE, save_biases
from finetune.recipe import ModelSettings, Recipe
from finetune.upstream import private

_MAKERS = ("peft", "torch", "transformers", "trl", "bitsandbytes")


def load_base(base: Base, settings: ModelSettings) -> Any:
    """The base model on this process's device, its linear layers and expert stacks in NF4 if the recipe says so.

    Embedding and head get rows for the new tokens. Raises WeightsError for weights that are missing or not finite.
    """
    options = loading_options(settings)
    if settings.load_in_4bit:
        options["quantization_config"] = MoeNf4Config(compute_dtype=options["dtype"])
    check_model_folder(base.folder)
    with reading(base.folder, "transformers cannot load it", "give a complete checkpoint"):
        model, report = base.family.transformers_class().from_pretrained(
            base.folder,
            config=base.config,
            device_map={"": PartialState().device},
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            local_files_only=True,
            **options,
        )
    if problems := differences(str(base.folder), report):
        raise WeightsError(problems)
    check_weights(model, settings.load_in_4bit, str(base.folder))
    grow_vocabulary(model, base.new_tokens)
    model.config.use_cache = False
    return model


def adapt(
    model: Any,
    base: Base,
    recipe: Recipe,
    choice: ExpertChoice | None = None,
    initial_adapter: InitialAdapter | None = None,
) -> PeftModel:
    """The loaded base model with an adapter on all experts or on the chosen ones, ready to train.

    The adapter is a fresh one, or starts as `initial_adapter`; rows of the new tokens belong to it.
    """
    peft_model = add_adapter(model, base.family, recipe.lora, base.new_tokens)
    if choice is not None:
        keep_chosen(peft_model, choice.experts)
    if initial_adapter is not None:
        initial_adapter.load_into(peft_model, base.family)
    # DDP would broadcast the frozen base, tensor by tensor, from rank 0 although every rank has read it itself; a
    # 4-bit stack cannot be written to. The adapter, initialised at random, is still synchronised.
    frozen = [name for name, parameter in peft_model.named_parameters() if not parameter.requires_grad]
    ignore = private("torch.nn.parallel:DistributedDataParallel._set_params_and_buffers_to_ignore_for_model")
    ignore(peft_model, frozen)
    enable_checkpointing(peft_model, recipe.training.gradient_checkpointing)
    return peft_model


def save_adapter(
    model: PeftModel,
    folder: Path,
    recipe: Recipe,
    base: Base,
    choice: ExpertChoice | None = None,
    initial_adapter: InitialAdapter | None = None,
    facts: Mapping[str, Any] | None = None,
) -> AdapterRecord:
    """Write a PEFT adapter and, beside it, `finetune.json` with what PEFT's format cannot say; returns that record.

    `facts`: its `data`, `metrics` and `template_sha256`, of a finished training.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = recipe.model.name_or_path, recipe.model.revision
    model.save_pretrained(folder, save_embedding_layers=False)
    started_from = None
    if initial_adapter is not None:
        started_from = InitialRecord(name_or_path=str(recipe.model.adapter), sha256=initial_adapter.digest())
    further: dict[str, Any] = dict(facts or {})
    if _save_router_bias(model, base.family, folder, recipe, initial_adapter):
        further["router_bias"] = BIAS_FILE
    record = AdapterRecord(
        format=FORMAT,
        base=base.provenance,
        layout=FactorLayout(expert_lora=EXPERT_LAYOUT),
        settings=deciding_settings(read_json(folder / CONFIG_FILE)),
        sha256=adapter_digest(folder),
        experts=None if choice is None else choice.as_dict(),
        added_tokens=dict(zip(recipe.model.added_tokens, new_tokens_of(model), strict=True)),
        quantization="nf4" if recipe.model.load_in_4bit else None,
        dtype=recipe.model.dtype,
        adapter=started_from,
        **further,
        recipe=recipe.model_dump(mode="json"),
        versions={"moe-finetune": finetune.__version__, **{name: version(name) for name in _MAKERS}},
    )
    record.write(folder)
    return record


def new_tokens_of(model: PeftModel) -> list[int]:
    """The ids whose rows an adapter holds, ascending."""
    indices: dict[str, list[int]] = model.peft_config["default"].trainable_token_indices or {}
    return next(iter(indices.values()), [])


def _save_router_bias(
    model: PeftModel, family: Family, folder: Path, recipe: Recipe, initial_adapter: InitialAdapter | None
) -> bool:
    """Write the correction biases if this training or an earlier one has moved them; returns whether one has."""
    moved = recipe.router is not None and recipe.router.bias_update_rate > 0
    if family.moe is None or not (moved or (initial_adapter is not None and initial_adapter.has_biases)):
        return False
    save_biases(model, family.moe, folder)
    return True
