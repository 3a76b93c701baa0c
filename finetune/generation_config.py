"""`generation_config.json`: the tokens at which generation stops, read from a checkpoint and written beside weights.

Like transformers and vLLM, the list of `config.json` counts only where `generation_config.json` has none.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.errors import Problem, WeightsError
from finetune.model_files import read_settings

FILE = "generation_config.json"
MAX_ID = 2**31
_KEY = "eos_token_id"


def stop_ids(folder: Path) -> list[int]:
    """The ids at which the checkpoint in `folder` stops, in their order; empty where it names none.

    Raises WeightsError for a value that is neither an id nor a list of them.
    """
    config = _settings(folder / "config.json")
    nested = config.get("text_config")
    for name, settings in (
        (FILE, _settings(folder / FILE)),
        ("config.json", config),
        ("config.json: text_config", nested if isinstance(nested, dict) else {}),
    ):
        if settings.get(_KEY) is not None:
            return _ids(f"{folder / name}: {_KEY}", settings[_KEY])
    return []


def generation_settings(folder: Path, ends: Sequence[int], pad: int | None = None) -> dict[str, Any]:
    """`generation_config.json` of a model that was trained from the one in `folder`, with all its settings.

    It stops at `ends`, too, and pads with `pad` if it is given. The folder's own ids all stay: nothing generates one
    that the vocabulary lacks.
    """
    before = _settings(folder / FILE)
    own = stop_ids(folder)
    stops = [*(token for token in dict.fromkeys(ends) if token not in own), *own]
    after = dict(before)
    if stops and (stops != own or _KEY not in before):
        after[_KEY] = stops[0] if len(stops) == 1 else stops
    if pad is not None:
        after["pad_token_id"] = pad
    if after != before:
        after.pop("_from_model_config", None)  # with it transformers 4 would take config.json's settings instead
    return after


def _settings(path: Path) -> dict[str, Any]:
    """A file of settings; empty where there is none."""
    return read_settings(path) if path.exists() else {}


def _ids(where: str, value: Any) -> list[int]:
    ids = value if isinstance(value, list) else [value]
    if any(type(token) is not int or not 0 <= token < MAX_ID for token in ids):
        what = "is neither a token's id nor a list of them"
        raise WeightsError(Problem(where, what, "write the ids at which generation stops", got=json.dumps(value)))
    return ids
