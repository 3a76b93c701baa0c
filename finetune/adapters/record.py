"""Whether what an adapter's folder says of itself can be read: kinds of values, before anything is made of them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import Problem, WeightsError

_STATE_FILES = ("trainer_state.json", "router_balance.json")  # of a trainer's own checkpoint
_Kinds = Mapping[str, tuple[type, ...]]
_SETTINGS: _Kinds = {
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "target_modules": (list, str),
    "target_parameters": (list,),
    "trainable_token_indices": (list, dict),
    "layers_to_transform": (list, int),
    "auto_mapping": (dict,),
}
_RECORD: _Kinds = {
    "base": (dict,),
    "layout": (dict,),
    "added_tokens": (dict,),
    "recipe": (dict,),
    "versions": (dict,),
    "adapter": (dict,),
}
_BASE: _Kinds = {"name_or_path": (str,), "fingerprint": (str,), "made_from": (dict,)}
_DO = "fetch or copy the adapter's folder again, or save the adapter again"


def check_readable(settings: Mapping[str, Any], settings_file: Path, record: Mapping[str, Any], file: Path) -> None:
    """Raise WeightsError for every value of another kind than what writes these two files writes."""
    problems = _wrong(settings, _SETTINGS, str(settings_file)) + _wrong(record, _RECORD, str(file))
    for name in ("rank_pattern", "alpha_pattern"):
        values = settings.get(name)
        if isinstance(values, dict) and not all(_is_number(value) for value in values.values()):
            problems.append(_problem(f"{settings_file}: {name}", values))
    if isinstance(settings.get("lora_alpha"), int | float) and not math.isfinite(settings["lora_alpha"]):
        problems.append(_problem(f"{settings_file}: lora_alpha", settings["lora_alpha"]))
    base, added = record.get("base"), record.get("added_tokens")
    if isinstance(base, dict):
        problems += _wrong(base, _BASE, f"{file}: base")
        if isinstance(base.get("made_from"), dict) and not {"base_fingerprint", "adapters"} <= base["made_from"].keys():
            problems.append(_problem(f"{file}: base.made_from", base["made_from"]))
    if isinstance(added, dict) and not all(isinstance(number, int) for number in added.values()):
        problems.append(_problem(f"{file}: added_tokens", added))
    method = record["recipe"].get("method") if isinstance(record.get("recipe"), dict) else {}
    if not isinstance(method, dict):
        problems.append(_problem(f"{file}: recipe.method", method))
    if problems:
        raise WeightsError(problems)


def check_not_training_state(folder: Path) -> None:
    """Raise WeightsError for a trainer's checkpoint with moved router biases: they are not among the factors there."""
    if all((folder / name).is_file() for name in _STATE_FILES):
        state = json.loads((folder / _STATE_FILES[1]).read_text(encoding="utf-8"))
        if isinstance(state, dict) and state.get("bias"):
            do = f"merge the finished adapter, {folder.parent / 'adapter'}, or let the run finish"
            what = "is a training checkpoint, whose router biases are not part of the adapter"
            raise WeightsError(Problem(str(folder), what, do))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _wrong(values: Mapping[str, Any], kinds: _Kinds, where: str) -> list[Problem]:
    found = ((name, values[name]) for name in kinds if values.get(name) is not None)
    return [_problem(f"{where}: {name}", value) for name, value in found if not isinstance(value, kinds[name])]


def _problem(where: str, got: Any) -> Problem:
    return Problem(where, "has the wrong type or value", _DO, got=json.dumps(got, default=str)[:80])
