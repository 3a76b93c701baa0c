"""The rows that `--compare` measures on: read and rendered as the adapter's training read and rendered its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.adapters.record import read_record
from finetune.data import load_tokenizer, prepare, prepare_pair_mixture
from finetune.errors import DataError
from finetune.recipe import DataSettings, DataSource

COMPARE_ROWS = 128  # rows that are measured where the user does not say
IGNORED = -100  # label of a token without a loss
Rows = Sequence[tuple[torch.Tensor, torch.Tensor]]
# Of an adapter that does not say how long its rows were: longer ones are cut.
MAX_LENGTH = 2048


def compare_rows(data: Path, count: int, adapter: Path, tokenizer: Path) -> Rows:
    """Ids and labels [T] of the first `count` rows of a data file, by the settings that the adapter records.

    Of pairs of answers the chosen ones are taken.

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
    try:
        rows = prepare([source], loaded, settings, seed=0).dataset
    except DataError as error:
        return _chosen(source, loaded, settings, error)
    return [(torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in rows]


def _chosen(source: DataSource, tokenizer: Any, settings: DataSettings, error: DataError) -> Rows:
    """Of a file of pairs the answers that were chosen; `error` of any other."""
    of_pairs = settings.model_copy(update={"loss_on": "assistant", "overlong": "truncate"})
    try:
        [found] = prepare_pair_mixture([source], tokenizer, of_pairs, seed=0).sets
    except DataError:
        raise error from None
    return [
        (
            torch.tensor(row["prompt_ids"] + row["chosen_ids"]),
            torch.tensor([IGNORED] * len(row["prompt_ids"]) + row["chosen_labels"]),
        )
        for row in found.dataset()
    ]


def _recorded(adapter: Path) -> dict[str, Any]:
    """The data section of the recipe that the adapter was trained with; empty where there is no record of it."""
    found: dict[str, Any] = (read_record(adapter).recipe or {}).get("data") or {}
    return found


def _source(data: Path, count: int, recorded: dict[str, Any]) -> DataSource:
    """The file as the recipe describes it if it names it, else as its columns tell."""
    given = [recorded.get("eval"), recorded.get("train")]
    known = [source for section in given for source in (section if isinstance(section, list) else [section]) if source]
    same: dict[str, Any] = next(
        (source for source in known if source.get("path") and Path(source["path"]).resolve() == data.resolve()), {}
    )
    how = {"format": same.get("format", "auto"), "columns": same.get("columns") or {}}
    return DataSource(path=str(data), max_rows=count, **how)
