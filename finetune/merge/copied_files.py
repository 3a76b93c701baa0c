"""Copy the files beside the weights: configuration, tokenizer, chat template, generation settings."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.checkpoint.reader import read_json
from finetune.errors import Problem, WeightsError
from finetune.files import write_json
from finetune.generation_config import FILE as GENERATION_FILE
from finetune.generation_config import generation_settings, stop_ids
from finetune.model_files import without_code

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
CONFIG_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def side_files(base: Path, adapters: Sequence[Path]) -> list[Path]:
    """The files to copy: tokenizer, template, generation settings; the last adapter's that has them, else the base's.

    A tokenizer is taken whole from one folder. Raises WeightsError when none has one.
    """
    with_tokenizer = [folder for folder in adapters if (folder / "tokenizer_config.json").is_file()]
    source, adapter = (with_tokenizer or [base])[-1], (with_tokenizer or list(adapters))[-1]
    files = _held(source, TOKENIZER_FILES)
    if not files:
        do = "the base folder needs its tokenizer files: the proof reads text with them"
        raise WeightsError(Problem(str(base), "has no tokenizer", do))
    files += _held(adapter, TEMPLATE_FILES) or _held(source, TEMPLATE_FILES)
    return files + (_held(adapter, (GENERATION_FILE,)) or _held(base, (GENERATION_FILE,)))


def _held(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


def copy_files(files: list[Path], folder: Path) -> None:
    """Copy contents only: what is a link in a download cache becomes a file."""
    for file in files:
        shutil.copyfile(file, folder / file.name)


def merged_generation(base: Path, files: Sequence[Path], tokenizer: Any) -> dict[str, Any]:
    """`generation_config.json` of the merged model: it stops where base and adapter do.

    `files` are those that are copied, `tokenizer` is the adapter's.
    """
    source = next((file.parent for file in files if file.name == GENERATION_FILE), base)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return generation_settings(source, [*eos, *stop_ids(base)])


def write_generation(folder: Path, settings: Mapping[str, Any] | None) -> None:
    """Write these settings into the merged folder, unless it has the same ones or there are none."""
    path = folder / GENERATION_FILE
    if settings and not (path.is_file() and read_json(path) == settings):
        write_json(path, settings)


def merged_config(
    base: Mapping[str, Any],
    dtype: str | None,
    vocab_size: int | None = None,
    eos: int | None = None,
    pad: int | None = None,
) -> dict[str, Any]:
    """The base's `config.json` for the merged model; `dtype` ("BF16") when the output has one of its own.

    `vocab_size`: rows of the merged embedding; `eos` and `pad`: of the tokenizer that was trained with. A pad token is
    replaced, not added: it decides nothing but which row of an embedding other trainers leave as it is.
    `output_router_logits` is off: left on, it breaks generation. Both spellings of the rotary base are written, so that
    readers from before and after transformers 5 see the same one.
    """
    config = without_code(base)
    if "output_router_logits" in config:
        config["output_router_logits"] = False
    if vocab_size is not None:
        config["vocab_size"] = vocab_size
    ends = config.get("eos_token_id")
    if eos is not None and eos not in (ends if isinstance(ends, list) else [ends]):
        config["eos_token_id"] = [eos, *ends] if isinstance(ends, list) else eos
    if pad is not None and config.get("pad_token_id") is not None:
        config["pad_token_id"] = pad
    if dtype is not None:
        names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
        config |= dict.fromkeys(names, CONFIG_NAMES[dtype])
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    elif rope is None and "rope_theta" in config:
        scaling = config.get("rope_scaling") or {"rope_type": "default"}
        config["rope_parameters"] = {**scaling, "rope_theta": config["rope_theta"]}
    return config
