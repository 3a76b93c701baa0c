"""Rows of two answers to one prompt, prepared as a preference run does, for the tests of its data."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from finetune.data import DataStats, PairTable, TokenPair, prepare_pair_mixture
from finetune.data.render import IGNORED
from finetune.errors import DataError
from finetune.recipe import DataSettings, DataSource
from tests.support import tiny_tokenizer

SHORT = {"prompt": "set the timer", "chosen": "done", "rejected": "no"}
LONG = {
    "prompt": "set the timer",
    "chosen": "turn on the kitchen light and set the timer to ten minutes",
    "rejected": "turn on the kitchen light and set the timer",
}


@dataclass(frozen=True)
class PreparedPairs:
    """`dataset` as `PairMixture.dataset` says. `stats` counts pairs as rows and the tokens of both their
    conversations."""

    table: PairTable
    dataset: Dataset
    stats: DataStats


def prepare_pairs(
    sources: Sequence[DataSource], tokenizer: Any, settings: DataSettings, seed: int, share_prompts: bool
) -> PreparedPairs:
    """As `prepare`, for rows of two answers to one prompt; `share_prompts` says what a pair takes when packed."""
    mixture = prepare_pair_mixture(sources, tokenizer, settings, seed)
    dataset = mixture.dataset(settings, share_prompts)
    return PreparedPairs(mixture.table, dataset, mixture.stats(len(dataset)))


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """One row a line; text as it stands, None as a blank line."""
    lines = (row if isinstance(row, str) else json.dumps(row) if row else "" for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def pair_settings(path: Path, row_format: str = "preference", **others: Any) -> DataSettings:
    """One file of `max_length` 256."""
    train = DataSource(path=str(path), format=row_format, **others.pop("train", {}))
    return DataSettings(**{"train": train, "max_length": 256, **others})


def prepared(
    tmp_path: Path,
    rows: Sequence[Any],
    row_format: str = "preference",
    share: bool = False,
    tokenizer: Any = None,
    **others: Any,
) -> PreparedPairs:
    """The rows, prepared with the tiny tokenizer or another one."""
    settings = pair_settings(write_rows(tmp_path / "rows.jsonl", rows), row_format, **others)
    return prepare_pairs(settings.sources("train"), tokenizer or tiny_tokenizer(), settings, 0, share)


def refusal(tmp_path: Path, rows: Sequence[Any], row_format: str = "preference", **others: Any) -> list[str]:
    """The lines that a user reads, without the folder."""
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, rows, row_format, **others)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def texts(tokenizer: Any, pair: TokenPair) -> tuple[str, str, str]:
    """Prompt, chosen and rejected."""
    ids = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    prompt, chosen, rejected = (tokenizer.decode(each.tolist(), clean_up_tokenization_spaces=False) for each in ids)
    return prompt, chosen, rejected


def supervised(tokenizer: Any, pair: TokenPair) -> tuple[list[str], list[str]]:
    """The runs of supervised tokens of each answer."""
    found = []
    for ids, labels in pair.answers:
        runs: list[list[int]] = [[]]
        for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
            assert label in (IGNORED, token)
            if label == IGNORED:
                runs.append([])
            else:
                runs[-1].append(label)
        found.append([tokenizer.decode(run) for run in runs if run])
    return found[0], found[1]
