"""An adapter that an earlier run has saved, from which another goes on: whether it fits, and its weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from finetune.errors import Problem, WeightsError
from finetune.moe.esft.choice import ExpertChoice
from finetune.moe.families import Family
from finetune.moe.router_bias import BIAS_FILE, load_biases
from finetune.moe.same_adapter import WEIGHTS_FILE, adapter_digest, refuse_other_adapter
from finetune.moe.targets import ADAPTER
from finetune.recipe import LoraSettings, Recipe

RECORD_FILE = "finetune.json"
TEMPLATE_FILE = "chat_template.jinja"
_OF_CHOICE = ("experts_share", "experts_score", "experts_tokens")


@dataclass(frozen=True)
class EarlierAdapter:
    """`record` is the adapter's `finetune.json`."""

    folder: Path
    record: dict[str, Any]

    @property
    def choice(self) -> ExpertChoice | None:
        """The experts that it adapts, where those are not all."""
        chosen = self.record.get("experts")
        return None if chosen is None else ExpertChoice.from_dict(chosen)

    @property
    def has_biases(self) -> bool:
        """Whether correction biases lie beside it."""
        return (self.folder / BIAS_FILE).is_file()

    def digest(self) -> str:
        """SHA-256 of its weights."""
        return adapter_digest(self.folder)

    def load_into(self, model: PeftModel, family: Family) -> None:
        """Put its weights in the place of a fresh adapter's; WeightsError where it has other factors."""
        refuse_other_adapter(model, self.folder)
        model.load_adapter(str(self.folder), ADAPTER, is_trainable=True)
        if family.moe is not None:
            load_biases(model, family.moe, self.folder)


def read_earlier(folder: Path) -> EarlierAdapter:
    """The adapter in a folder; WeightsError where there is none that says what it was made on."""
    where = "model.adapter"
    if not (folder / WEIGHTS_FILE).is_file():
        inside = folder / "adapter" / WEIGHTS_FILE
        do = f"write {inside.parent}" if inside.is_file() else "name the folder adapter/ of a finished run"
        raise WeightsError(Problem(where, f"no adapter here: {WEIGHTS_FILE} is missing", do, got=str(folder)))
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    if not _is_record(record):
        what = f"the adapter does not say what it was made on: its {RECORD_FILE} is missing or damaged"
        do = "use an adapter of this toolkit; merge another tool's and name the merged model as the base"
        raise WeightsError(Problem(where, what, do, got=str(folder)))
    return EarlierAdapter(folder, record)


def _is_record(record: Any) -> bool:
    """Whether everything that is read of it can be read."""
    try:
        LoraSettings.model_validate(record["recipe"]["lora"])
        if record.get("experts") is not None:
            ExpertChoice.from_dict(record["experts"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return isinstance(record.get("base"), dict) and isinstance(record.get("added_tokens", {}), dict)


def refuse_unfit(earlier: EarlierAdapter, recipe: Recipe, base: str | None, template: str) -> None:
    """Raise WeightsError with everything in which the run differs from the one that made the adapter.

    `base`: fingerprint of this run's base, None where it is not here yet; `template`: the chat template that renders
    its rows.
    """
    record, problems = earlier.record, []
    made_on = record["base"]
    name = made_on.get("name_or_path")

    def differs(key: str, what: str, before: object, now: object) -> None:
        do = "make the recipe the same as the adapter's, or train an adapter of your own first"
        problems.append(Problem(key, f"{what} in {earlier.folder} is {before!r}", do, got=repr(now)))

    if base is not None and made_on.get("fingerprint") != base:
        what = f"the adapter in {earlier.folder} was made on another base, {name} with other weights"
        do = "name that base in model.name_or_path, or an adapter that was made on this one"
        problems.append(Problem("model.adapter", what, do, got=recipe.model.name_or_path))
    quantization = "nf4" if recipe.model.load_in_4bit else None
    if record.get("quantization") != quantization:
        differs(
            "model.load_in_4bit", "quantisation of the base of the adapter", record.get("quantization"), quantization
        )
    saved = earlier.folder / TEMPLATE_FILE
    if (saved.read_text(encoding="utf-8") if saved.is_file() else None) != template:
        what = f"the adapter in {earlier.folder} was trained with another chat template"
        do = f"write data.chat_template: {saved}, or what the adapter's recipe has there"
        problems.append(Problem("data.chat_template", what, do, got=str(recipe.data.chat_template)))
    if list(record.get("added_tokens", {})) != list(recipe.model.added_tokens):
        before = list(record.get("added_tokens", {}))
        differs("model.added_tokens", "the added tokens of the adapter", before, list(recipe.model.added_tokens))
    then, now = _shape(LoraSettings.model_validate(record["recipe"]["lora"])), _shape(recipe.lora)
    for key in then:
        if key in now and then[key] != now[key]:
            differs(f"lora.{key}", "of the adapter", then[key], now[key])
    if problems:
        raise WeightsError(problems)


def _shape(lora: LoraSettings) -> dict[str, Any]:
    """What decides the factors and what they stand for."""
    return {
        "targets": sorted(lora.targets),
        "r": lora.r,
        "lora_alpha": float(lora.lora_alpha),
        "expert_r": lora.expert_r or lora.r,
        "expert_lora_alpha": float(lora.expert_lora_alpha or lora.lora_alpha),
        "use_rslora": lora.use_rslora,
        "experts": lora.experts,
        # The adapter's choice is taken over, so these would be ignored.
        **({name: getattr(lora, name) for name in _OF_CHOICE} if lora.experts == "auto" else {}),
    }
