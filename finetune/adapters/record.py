"""`finetune.json`: facts about an adapter that PEFT's own files cannot hold. One model, one reader, one writer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from finetune.checkpoint.reader import read_json
from finetune.errors import Problem, WeightsError

RECORD_FILE = "finetune.json"
FORMAT = 1
EXPERT_LAYOUT = "A:expert-major,B:rank-major"
SAVE_AGAIN = "fetch or copy the adapter's folder again, or save the adapter again"

_EXPECTED = {
    "model_type": "an object",
    "dict_type": "an object",
    "list_type": "a list",
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
}
_SECTIONS = ("lora", "method", "data")  # of a recipe, read when an adapter is merged, inspected or trained further


class _Part(BaseModel):
    """Unknown keys are ignored: other versions may write more."""

    model_config = ConfigDict(strict=True, frozen=True)


class MergedAdapter(_Part):
    """An adapter inside a merged checkpoint, by the SHA-256 of its weights."""

    sha256: str
    weight: float


class MergeSources(_Part):
    """What a merged checkpoint was made from."""

    base_fingerprint: str
    into: str | None = None
    adapters: list[MergedAdapter]


class BaseRecord(_Part):
    """The base that an adapter was trained on: `fingerprint` of its weights, `config` what decides its forward,
    `made_from` if it was a merged checkpoint."""

    name_or_path: str | None = None
    fingerprint: str | None = None
    config: dict[str, Any] | None = None  # `checkpoint.forward_settings`
    made_from: MergeSources | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields that were set, as JSON holds them."""
        return self.model_dump(exclude_unset=True)


class FactorLayout(_Part):
    """Order of the factors in the two matrices of an expert stack."""

    expert_lora: str | None = None


class InitialRecord(_Part):
    """The adapter that training started from, by the SHA-256 of its weights."""

    name_or_path: str
    sha256: str


class DataRecord(_Part):
    """A data set of the training; `content` is the digest of its rows, `digest` that of earlier versions."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    name: str
    rows: int | None = None
    tokens: int | None = None
    content: str | None = None
    digest: str | None = None


class AdapterRecord(_Part):
    """Every field may be missing: other tools and earlier versions wrote fewer."""

    format: int | None = None
    base: BaseRecord | None = None
    layout: FactorLayout | None = None
    settings: dict[str, Any] | None = None  # those of `adapter_config.json` that decide what the adapter computes
    sha256: str | None = None  # of its weights
    experts: dict[str, Any] | None = None  # `ExpertChoice.as_dict()`, where not all experts are adapted
    added_tokens: dict[str, int] = {}
    quantization: str | None = None  # of the base in training: "nf4" or None
    dtype: str | None = None
    adapter: InitialRecord | None = None
    router_bias: str | None = None  # file with the correction biases that training moved
    data: dict[str, list[DataRecord]] | None = None
    metrics: dict[str, dict[str, float | int | str | None]] | None = None
    template_sha256: str | None = None
    template_day: str | None = None  # the date that the template wrote in training, YYYY-MM-DD
    template_args: dict[str, Any] | None = None  # the variables that it was given in training, if any
    recipe: dict[str, Any] | None = None
    versions: dict[str, str] | None = None

    @field_validator("recipe")
    @classmethod
    def _sections_are_objects(cls, recipe: dict[str, Any] | None) -> dict[str, Any] | None:
        wrong = [name for name in _SECTIONS if not isinstance((recipe or {}).get(name, {}), dict)]
        if wrong:
            raise ValueError(wrong[0])
        return recipe

    @property
    def says_quantization(self) -> bool:
        """Whether the record has the key; its value None means 16 bits."""
        return "quantization" in self.model_fields_set

    def as_dict(self) -> dict[str, Any]:
        """The fields that were set, as JSON holds them."""
        return self.model_dump(exclude_unset=True)

    def write(self, folder: Path) -> None:
        """Write it beside the adapter in `folder`."""
        text = json.dumps(self.as_dict(), indent=2) + "\n"
        (folder / RECORD_FILE).write_text(text, encoding="utf-8")


def read_record(folder: Path) -> AdapterRecord:
    """The record in an adapter's folder; an empty one where there is no such file.

    Raises WeightsError with every value that has the wrong type.
    """
    file = Path(folder) / RECORD_FILE
    if not file.is_file():
        return AdapterRecord()
    try:
        return AdapterRecord.model_validate(read_json(file))
    except ValidationError as error:
        raise WeightsError([_problem(file, details) for details in error.errors(include_url=False)]) from error


def _problem(file: Path, details: Mapping[str, Any]) -> Problem:
    location, value, kind = ".".join(map(str, details["loc"])), details["input"], details["type"]
    if kind == "missing":
        return Problem(f"{file}: {location}", "is missing", SAVE_AGAIN)
    if kind == "value_error":  # of `_sections_are_objects`
        section = str(details["ctx"]["error"])
        location, value = f"{location}.{section}", value[section]
    return wrong_type(f"{file}: {location}", _EXPECTED.get(kind, "an object"), value)


def wrong_type(where: str, expected: str, value: Any) -> Problem:
    """A value of an adapter's JSON files that nothing writes there."""
    return Problem(where, f"has the wrong type (expected {expected})", SAVE_AGAIN, json.dumps(value, default=str)[:80])
