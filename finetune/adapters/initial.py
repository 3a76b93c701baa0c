"""The adapter that training starts from instead of a fresh one: whether it fits the run, and its weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict

from finetune.adapters.adapter import WEIGHTS_FILE, adapter_digest, read_adapter
from finetune.adapters.locate import adapter_folder
from finetune.adapters.record import RECORD_FILE, AdapterRecord, BaseRecord, read_record
from finetune.checkpoint import differing_settings
from finetune.checkpoint.reader import read_header
from finetune.errors import Problem, WeightsError
from finetune.files import read_text
from finetune.model_files import reading
from finetune.moe.esft import ExpertChoice
from finetune.moe.families import Family
from finetune.moe.lora import ADAPTER
from finetune.moe.router_bias import BIAS_FILE, load_biases
from finetune.recipe import LoraSettings, Recipe

TEMPLATE_FILE = "chat_template.jinja"
_CHOICE_SETTINGS = ("experts_share", "experts_score", "experts_tokens")
_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class InitialAdapter:
    """An adapter that one of this toolkit's runs has saved. `choice`: the experts that it adapts, if not all."""

    folder: Path
    record: AdapterRecord
    base: BaseRecord
    lora: LoraSettings
    choice: ExpertChoice | None

    @property
    def has_biases(self) -> bool:
        """Whether correction biases lie beside it."""
        return (self.folder / BIAS_FILE).is_file()

    def digest(self) -> str:
        """SHA-256 of its weights."""
        return adapter_digest(self.folder)

    def load_into(self, model: PeftModel, family: Family) -> None:
        """Replace a fresh adapter's weights by its own; WeightsError where it has other factors."""
        check_same_factors(model, self.folder)
        model.load_adapter(str(self.folder), ADAPTER, is_trainable=True)
        if family.moe is not None:
            load_biases(model, family.moe, self.folder)


def read_initial_adapter(folder: Path) -> InitialAdapter:
    """The adapter of a folder or a run; WeightsError where there is none that says what it was trained on."""
    where, folder = "model.adapter", adapter_folder(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        do = "name the output_dir of a finished run, RUN/checkpoint-N or RUN@best"
        raise WeightsError(Problem(where, f"no adapter here: {WEIGHTS_FILE} is missing", do, got=str(folder)))
    try:
        initial = _from_record(folder, read_record(folder))
    except (WeightsError, KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"the adapter does not say what it was made on: its {RECORD_FILE} is missing or damaged"
        do = "use an adapter of this toolkit; merge another tool's and name the merged model as the base"
        raise WeightsError(Problem(where, what, do, got=str(folder))) from error
    read_adapter(folder)  # raises where checksums, settings or weights are not those of the training
    return initial


def _from_record(folder: Path, record: AdapterRecord) -> InitialAdapter:
    """Raises KeyError, TypeError, ValueError or AttributeError for a record without what is needed."""
    if record.base is None or record.recipe is None:
        raise KeyError("base" if record.base is None else "recipe")
    choice = None if record.experts is None else ExpertChoice.from_dict(record.experts)
    return InitialAdapter(folder, record, record.base, LoraSettings.model_validate(record.recipe["lora"]), choice)


def check_same_setup(initial: InitialAdapter, recipe: Recipe, base: BaseRecord, template: str) -> None:
    """To continue from an adapter, its base, quantization, chat template with its variables, and `lora` must match.

    `base`: this run's, without a fingerprint while its weights are not on this machine; `template`: the run's chat
    template. Raises WeightsError with everything that differs.
    """
    record, problems = initial.record, []

    def differs(key: str, what: str, before: object, now: object) -> None:
        do = "make the recipe the same as the adapter's, or train an adapter of your own first"
        problems.append(Problem(key, f"{what} in {initial.folder} is {before!r}", do, got=repr(now)))

    if base.fingerprint is not None and initial.base.fingerprint != base.fingerprint:
        name = initial.base.name_or_path
        what = f"the adapter in {initial.folder} was made on another base, {name} with other weights"
        do = "name that base in model.name_or_path, or an adapter that was made on this one"
        problems.append(Problem("model.adapter", what, do, got=recipe.model.name_or_path))
    elif changed := differing_settings(initial.base.config, base.config or {}):
        what = f"the adapter in {initial.folder} was made on a base with another config.json"
        do = "name that base in model.name_or_path, or an adapter that was made on this one"
        problems.append(Problem("model.adapter", what, do, got="; ".join(changed)))
    quantization = "nf4" if recipe.model.load_in_4bit else None
    if record.quantization != quantization:
        what = "quantisation of the base of the adapter"
        differs("model.load_in_4bit", what, record.quantization, quantization)
    problems += _other_prompts(initial, recipe, template)
    before, now = list(record.added_tokens), list(recipe.model.added_tokens)
    if before != now:
        differs("model.added_tokens", "the added tokens of the adapter", before, now)
    its_factors, factors = _factor_settings(initial.lora), _factor_settings(recipe.lora)
    for key in its_factors:
        if key in factors and its_factors[key] != factors[key]:
            differs(f"lora.{key}", "of the adapter", its_factors[key], factors[key])
    if problems:
        raise WeightsError(problems)


def _other_prompts(initial: InitialAdapter, recipe: Recipe, template: str) -> list[Problem]:
    """What makes the run's prompts other ones than the adapter was trained on: the template, its variables."""
    problems = []
    saved = initial.folder / TEMPLATE_FILE
    with reading(saved, "cannot be read"):
        before_it = read_text(saved) if saved.exists() else None
    if before_it != template:
        what = f"the adapter in {initial.folder} was trained with another chat template"
        do = f"write data.chat_template: {saved}, or what the adapter's recipe has there"
        problems.append(Problem("data.chat_template", what, do, got=str(recipe.data.chat_template)))
    before, now = initial.record.template_args or {}, recipe.data.template_args
    if before != now:
        what = f"the adapter in {initial.folder} was trained with other variables of the chat template"
        problems.append(Problem("data.template_args", what, f"write {json.dumps(before)}", got=json.dumps(now)))
    return problems


def _factor_settings(lora: LoraSettings) -> dict[str, Any]:
    """The settings that decide which factors there are and how they are scaled."""
    return {
        "targets": sorted(lora.targets),
        "r": lora.r,
        "lora_alpha": float(lora.lora_alpha),
        "expert_r": lora.expert_r or lora.r,
        "expert_lora_alpha": float(lora.expert_lora_alpha or lora.lora_alpha),
        "use_rslora": lora.use_rslora,
        "experts": lora.experts,
        # The adapter's choice of experts is used, so other values of these would be ignored.
        **({name: getattr(lora, name) for name in _CHOICE_SETTINGS} if lora.experts == "auto" else {}),
    }


def check_same_factors(model: PeftModel, folder: Path) -> None:
    """Raise WeightsError unless the adapter in `folder` has the model's factors by name and shape; reads no weight.

    PEFT loads the factors that fit and only warns about the rest, so a part of the adapter would stay as initialised.
    """
    file = folder / WEIGHTS_FILE
    on_disk = {key: info.shape for key, info in read_header(file).items()}
    in_memory = {key: tuple(value.shape) for key, value in _saved_state(model).items()}
    do = "continue with the model, the recipe and the versions that made it, or start anew in another output_dir"
    problems = []
    for what, keys in (
        ("the adapter has no such factors", in_memory.keys() - on_disk.keys()),
        ("the model has no such factors; the adapter was made for another layout", on_disk.keys() - in_memory.keys()),
    ):
        if keys:
            shown = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            problems.append(Problem(str(file), what, do, got=shown))
    for key in sorted(in_memory.keys() & on_disk.keys()):
        if in_memory[key] != on_disk[key]:
            what = f"factor has another shape than the model's {list(in_memory[key])}"
            problems.append(Problem(f"{file}: {key}", what, do, got=str(list(on_disk[key]))))
    if problems:
        raise WeightsError(problems[:_SHOWN_PROBLEMS])


def _saved_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """The tensors that are saved; not the whole embedding, which PEFT would add where new tokens made it longer."""
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state
