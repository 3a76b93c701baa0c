"""The rows that `--compare` measures on: read and rendered as the adapter's training read and rendered its own."""

from pathlib import Path
from typing import Any

import torch

from finetune.adapters.adapter import RECORD_FILE
from finetune.checkpoint.reader import read_json
from finetune.data import load_tokenizer, prepare
from finetune.recipe import DataSettings, DataSource

COMPARE_ROWS = 128  # rows that are measured where the user does not say
IGNORED = -100  # label of a token without a loss
# Of an adapter that does not say how long its rows were: longer ones are cut.
MAX_LENGTH = 2048


def compare_rows(data: Path, count: int, adapter: Path, tokenizer: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels [T] of the first `count` rows of a data file, by the settings that the adapter records.

    `tokenizer`: the folder with the merged model's. Raises DataError for a file that cannot be read, and for rows
    with nothing to learn in them.
    """
    recorded = _recorded(adapter)
    own = tokenizer == adapter  # then it carries the template that was trained with
    loaded = load_tokenizer(str(tokenizer), None, None if own else recorded.get("chat_template"))
    source = _source(data, count, recorded)
    settings = DataSettings.model_validate(
        {
            "max_length": MAX_LENGTH,
            "overlong": "truncate",
            **{name: recorded[name] for name in ("loss_on", "system", "max_length", "overlong") if name in recorded},
            "train": source,
            "chat_template": None if own else recorded.get("chat_template"),
        }
    )
    rows = prepare([source], loaded, settings, seed=0).dataset
    return [(torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in rows]


def _recorded(adapter: Path) -> dict[str, Any]:
    """The data section of the recipe that the adapter was trained with; empty where there is no record of it."""
    file = adapter / RECORD_FILE
    recipe = read_json(file).get("recipe") if file.is_file() else None
    found: dict[str, Any] = (recipe or {}).get("data") or {}
    return found


def _source(data: Path, count: int, recorded: dict[str, Any]) -> DataSource:
    """The file as the recipe describes it if it names it, else as its columns tell."""
    given = [recorded.get("eval"), recorded.get("train")]
    known = [source for each in given for source in (each if isinstance(each, list) else [each]) if source]
    same: dict[str, Any] = next(
        (each for each in known if each.get("path") and Path(each["path"]).resolve() == data.resolve()), {}
    )
    how = {"format": same.get("format", "auto"), "columns": same.get("columns") or {}}
    return DataSource(path=str(data), max_rows=count, **how)
