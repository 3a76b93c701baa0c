"""The tokenizer of a folder, by transformers, from files that were looked at before: no code, no network, no growth."""

import json
from pathlib import Path
from typing import Any

from finetune.errors import Problem, WeightsError
from finetune.files import read_regular
from finetune.model_files.config import CONFIG_FILE, check_model_folder, load_config
from finetune.model_files.settings import FETCH_AGAIN, read_settings, reading

SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
LARGE_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "merges.txt")
MAX_BYTES = 2**27
"""Of one file of a tokenizer; the largest published ones have a quarter of it."""
GROWTH = 64
"""How many times longer a normalizer may make a text."""

_PROBE = "What is 2+2?"
_TEKKEN_NUMBERS = {"num_vocab_tokens": 2**24, "default_vocab_size": 2**24, "default_num_special_tokens": 2**16}
_DO = "give the folder of a checkpoint with its tokenizer files, or its name on the hub"
_ANOTHER = "use the tokenizer of another checkpoint"


def read_tokenizer(name_or_path: str, **options: Any) -> Any:
    """`AutoTokenizer.from_pretrained` of a folder, or of a name on the hub; WeightsError for what cannot be read."""
    from transformers import AutoTokenizer

    folder = Path(name_or_path)
    if folder.is_dir():
        check_model_folder(folder)
        _check_files(folder)
        options["local_files_only"] = True
        if (folder / CONFIG_FILE).is_file():
            options["config"] = load_config(folder)
    with reading(folder, "no tokenizer could be loaded", _DO):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False, **options)
        if tokenizer.is_fast:
            _check_growth(folder, tokenizer.backend_tokenizer.normalizer)
        tokenizer(_PROBE)
    return tokenizer


def _check_files(folder: Path) -> None:
    for name in SETTINGS_FILES:
        if (folder / name).exists():
            read_settings(folder / name)
    for name in LARGE_FILES:
        file = folder / name
        if file.exists() and (size := file.stat().st_size) > MAX_BYTES:
            what = f"is larger than {MAX_BYTES >> 20} MiB, which no tokenizer is"
            raise WeightsError(Problem(str(file), what, _ANOTHER, got=f"{size:,} bytes"))
    if (folder / "tekken.json").exists():
        _check_tekken(folder / "tekken.json")


def _check_tekken(file: Path) -> None:
    """mistral-common makes as many special tokens as the file says."""
    with reading(file, "is not Mistral's file of a tokenizer"):
        config = json.loads(read_regular(file, MAX_BYTES))["config"]
        for name, most in _TEKKEN_NUMBERS.items():
            value = config.get(name)
            if value is not None and (type(value) is not int or not 0 <= value <= most):
                must = f"must be a whole number up to {most}"
                raise WeightsError(Problem(f"{file}: config.{name}", must, FETCH_AGAIN, json.dumps(value)[:80]))


def _check_growth(folder: Path, normalizer: Any) -> None:
    """Raise WeightsError for a normalizer that makes a text longer and longer: nothing interrupts it."""
    if normalizer is None:
        return
    growth = _growth(json.loads(normalizer.__getstate__()))
    if growth > GROWTH:
        what = f"the normalizer may make a text {growth:.3g} times longer, and a tokenizer's never more than {GROWTH}"
        raise WeightsError(Problem(str(folder / "tokenizer.json"), what, _ANOTHER))


def _growth(step: dict[str, Any]) -> float:
    """By how much one step, or a sequence of them, makes a text longer at most; a prefix counts as one more."""
    growth = 1.0
    for part in step.get("normalizers", []):
        growth *= _growth(part)
    if step.get("type") == "Replace":
        found = step["pattern"].get("String")
        return max(1.0, len(step["content"]) / len(found)) if found else len(step["content"]) + 1.0
    return growth + (len(step["prepend"]) / 16 if step.get("type") == "Prepend" else 0)
