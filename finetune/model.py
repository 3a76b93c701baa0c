"""The base model and its adapter in memory, and the adapter on disk."""

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

import finetune
from finetune.adapters.adapter import CONFIG_FILE, WEIGHTS_FILE, adapter_digest, deciding_settings
from finetune.adapters.initial import InitialAdapter
from finetune.adapters.record import EXPERT_LAYOUT, FORMAT, AdapterRecord, FactorLayout, InitialRecord
from finetune.base import Base, loading_options
from finetune.checkpoint import read_json
from finetune.errors import WeightsError
from finetune.files import write_text
from finetune.model_files import check_model_folder, reading
from finetune.moe.checkpointing import enable_checkpointing
from finetune.moe.esft import ExpertChoice, keep_chosen
from finetune.moe.families import Family
from finetune.moe.lora import add_adapter, grow_vocabulary
from finetune.moe.nf4_loading import MoeNf4Config, check_weights
from finetune.moe.preflight import differences
from finetune.moe.router_bias import BIAS_FILE, find_biases
from finetune.moe.stored_bytes import Share
from finetune.recipe import LoraSettings, ModelSettings, Recipe
from finetune.upstream import private

_SETS = ("target_modules", "exclude_modules")  # in PEFT's settings
_MAKERS = ("peft", "torch", "transformers", "trl", "bitsandbytes")


def load_base(base: Base, settings: ModelSettings, share: Share | None = None) -> Any:
    """The base model on this process's device, its linear layers and expert stacks in NF4 if the recipe says so.

    Embedding and head get rows for the new tokens. `share`: of a model that is to be sharded, what this process reads
    of 4-bit expert stacks. Raises WeightsError for weights that are missing or not finite.
    """
    options = loading_options(settings)
    if settings.load_in_4bit:
        options["quantization_config"] = MoeNf4Config(compute_dtype=options["dtype"], share=share)
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
    peft_model = _with_adapter(model, base, recipe.lora, choice, initial_adapter)
    # DDP would broadcast the frozen base, tensor by tensor, from rank 0 although every rank has read it itself; a
    # 4-bit stack cannot be written to. The adapter, initialised at random, is still synchronised.
    frozen = [name for name, parameter in peft_model.named_parameters() if not parameter.requires_grad]
    ignore = private("torch.nn.parallel:DistributedDataParallel._set_params_and_buffers_to_ignore_for_model")
    ignore(peft_model, frozen)
    enable_checkpointing(peft_model, recipe.training.gradient_checkpointing)
    return peft_model


def _with_adapter(
    model: Any, base: Base, lora: LoraSettings, choice: ExpertChoice | None, initial_adapter: InitialAdapter | None
) -> PeftModel:
    peft_model = add_adapter(model, base.family, lora, base.new_tokens)
    if choice is not None:
        keep_chosen(peft_model, choice.experts)
    if initial_adapter is not None:
        initial_adapter.load_into(peft_model, base.family)
    return peft_model


def load_trained(base: Base, settings: ModelSettings, adapter: InitialAdapter) -> Any:
    """The base as an adapter's training had it, with that adapter, to generate with."""
    model = _with_adapter(load_base(base, settings), base, adapter.lora, adapter.choice, adapter)
    return model.get_base_model().eval()


@dataclass(frozen=True)
class AdapterSnapshot:
    """An adapter as it is at one step, on the CPU: training further does not change it.

    `biases`: the routers' correction biases by name; None for a model without them.
    """

    config: Any
    factors: dict[str, torch.Tensor]
    new_tokens: list[int]
    biases: dict[str, torch.Tensor] | None


def snapshot_adapter(model: PeftModel, family: Family) -> AdapterSnapshot:
    """A copy of what training changes."""
    # Without the whole embedding, which PEFT would add where new tokens made it longer.
    factors = get_peft_model_state_dict(model, save_embedding_layers=False)
    biases = {} if family.moe is None else find_biases(model, family.moe)
    return AdapterSnapshot(
        copy.deepcopy(model.peft_config["default"]), _copied(factors), new_tokens_of(model), _copied(biases) or None
    )


def _copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def save_adapter(
    adapter: AdapterSnapshot,
    folder: Path,
    recipe: Recipe,
    base: Base,
    choice: ExpertChoice | None = None,
    initial_adapter: InitialAdapter | None = None,
    facts: Mapping[str, Any] | None = None,
) -> AdapterRecord:
    """Write a PEFT adapter and, beside it, `finetune.json` with what PEFT's format cannot say; returns that record.

    The bytes are those of PEFT's own `save_pretrained`, without its card, which has only blanks to fill in, and with
    names in one order. `facts`: its `data`, `metrics` and `template_sha256`. The same adapter gives the same bytes:
    nothing in the files depends on the folder that the run writes to, or on how often it was started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(adapter.config)
    config.base_model_name_or_path, config.revision = recipe.model.name_or_path, recipe.model.revision
    config.inference_mode = True
    save_file(adapter.factors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config.save_pretrained(folder)
    _order_settings(folder / CONFIG_FILE)
    shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)  # safetensors lets its owner alone read it
    started_from = None
    if initial_adapter is not None:
        started_from = InitialRecord(name_or_path=str(initial_adapter.folder), sha256=initial_adapter.digest())
    further: dict[str, Any] = dict(facts or {})
    moved = recipe.router is not None and recipe.router.bias_update_rate > 0
    if adapter.biases and (moved or (initial_adapter is not None and initial_adapter.has_biases)):
        save_file(adapter.biases, folder / BIAS_FILE, metadata={"format": "pt"})
        shutil.copymode(folder / CONFIG_FILE, folder / BIAS_FILE)
        further["router_bias"] = BIAS_FILE
    record = AdapterRecord(
        format=FORMAT,
        base=base.provenance,
        layout=FactorLayout(expert_lora=EXPERT_LAYOUT),
        settings=deciding_settings(read_json(folder / CONFIG_FILE)),
        sha256=adapter_digest(folder),
        experts=None if choice is None else choice.as_dict(),
        added_tokens=dict(zip(recipe.model.added_tokens, adapter.new_tokens, strict=True)),
        quantization="nf4" if recipe.model.load_in_4bit else None,
        dtype=recipe.model.dtype,
        adapter=started_from,
        **further,
        recipe=recipe.model_dump(mode="json", exclude={"output_dir": True, "training": {"resume"}}),
        versions={"moe-finetune": finetune.__version__, **{name: version(name) for name in _MAKERS}},
    )
    record.write(folder)
    return record


def _order_settings(file: Path) -> None:
    """Sort the names that PEFT keeps as a set, whose order is another one in each process."""
    settings = read_json(file)
    for name in _SETS:
        if isinstance(settings.get(name), list):
            settings[name] = sorted(settings[name])
    write_text(file, json.dumps(settings, indent=2, sort_keys=True))


def new_tokens_of(model: PeftModel) -> list[int]:
    """The ids whose rows an adapter holds, ascending."""
    indices: dict[str, list[int]] = model.peft_config["default"].trainable_token_indices or {}
    return next(iter(indices.values()), [])
