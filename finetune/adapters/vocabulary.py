"""Rows of embedding and head that an adapter holds whole: those of added tokens, which the merged checkpoint takes.

n rows in the adapter, V rows of a matrix, H hidden.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig

from finetune.adapters.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from finetune.adapters.contents import EMBEDDING, HEAD, PREFIX
from finetune.checkpoint import CheckpointReader, TensorInfo
from finetune.checkpoint.reader import read_tensor
from finetune.errors import Problem, WeightsError

_OTHER_BASE = "merge into the base it was trained on"


@dataclass(frozen=True)
class TokenRows:
    """The rows `tokens` of one matrix on disk (`key`, of `base_rows` rows in the base) that the adapter replaces."""

    key: str
    info: TensorInfo  # [n, H] in the adapter
    tokens: tuple[int, ...]
    base_rows: int

    @property
    def shape(self) -> tuple[int, int]:
        """[V, H] of the merged matrix: longer than the base's where a token has no row there."""
        return max(self.base_rows, max(self.tokens) + 1), self.info.shape[1]

    def put(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """A copy of rows `start` and on of the merged matrix, with those of the adapter in their places."""
        rows, values_nH = rows.clone(), read_tensor(self.info)
        for token, value in zip(self.tokens, values_nH, strict=True):
            if start <= token < start + len(rows):
                rows[token - start] = value.to(rows.dtype)
        return rows

    def beyond(self, dtype: torch.dtype) -> torch.Tensor:
        """The rows that the base does not have."""
        return self.put(torch.empty(self.shape[0] - self.base_rows, self.shape[1], dtype=dtype), self.base_rows)

    def onto(self, matrix: torch.Tensor) -> torch.Tensor:
        """The merged matrix, from the base's."""
        return torch.cat([self.put(matrix, 0), self.beyond(matrix.dtype)])


def token_rows(base: CheckpointReader, adapter: Adapter, changed: Iterable[str]) -> dict[str, TokenRows]:
    """What the adapter replaces, by key on disk; empty for an adapter without added tokens.

    `changed`: tensors that its factors change. Raises WeightsError unless the rows fit the base and each other.
    """
    tied = bool(AutoConfig.for_model(**base.config).tie_word_embeddings)
    found: dict[str, TokenRows] = {}
    problems = [_without_rows(adapter, name) for name in adapter.tokens if not adapter.path_of(name)]
    for path, info in adapter.rows.items():
        key, tokens = f"{path}.weight", adapter.tokens_of(path)
        if not tokens:
            problems.append(_unnamed(adapter, path))
        elif problem := _misfit(base, adapter, path, tokens, tied):
            problems.append(problem)
        else:
            # A tied checkpoint may have written its one matrix twice.
            for name in (key, HEAD) if tied and base.holds(HEAD) else (key,):
                found[name] = TokenRows(name, info, tokens, base.info(name).shape[0])
    problems += _length_problems(base, adapter, found) if not problems else []
    problems += [
        Problem(str(adapter.folder), "has both factors and rows of one matrix", "save the adapter again", got=key)
        for key in sorted(set(found) & set(changed))
    ]
    if problems:
        raise WeightsError(problems)
    return found


def _misfit(base: CheckpointReader, adapter: Adapter, path: str, tokens: tuple[int, ...], tied: bool) -> Problem | None:
    """What is wrong with the rows of one matrix, if anything."""
    where, info, key = f"{adapter.folder / WEIGHTS_FILE}: {PREFIX}{path}", adapter.rows[path], f"{path}.weight"
    if key not in ((EMBEDDING,) if tied else (EMBEDDING, HEAD)) or not base.holds(key):
        return Problem(where, "rows of a matrix that the base does not have", _OTHER_BASE)
    if info.shape != (len(tokens), base.info(key).shape[1]):
        got = f"{list(info.shape)} for {len(tokens)} tokens and rows of {base.info(key).shape[1]}"
        what = "the rows do not fit the base, or not the tokens that the settings name"
        return Problem(where, what, _OTHER_BASE, got)
    return None


def _unnamed(adapter: Adapter, path: str) -> Problem:
    where = f"{adapter.folder / CONFIG_FILE}: trainable_token_indices"
    return Problem(where, "does not say which tokens the rows belong to", "save the adapter again", got=path)


def _without_rows(adapter: Adapter, name: str) -> Problem:
    where = str(adapter.folder / WEIGHTS_FILE)
    return Problem(where, "has no rows for a matrix that its settings name", "save the adapter again", got=name)


def _length_problems(base: CheckpointReader, adapter: Adapter, found: Mapping[str, TokenRows]) -> list[Problem]:
    """All matrices of the vocabulary must be as long as the longest, without a row that nobody has written."""
    where = f"{adapter.folder / CONFIG_FILE}: trainable_token_indices"
    problems = []
    for rows in found.values():
        if gap := sorted(set(range(rows.base_rows, rows.shape[0])) - set(rows.tokens)):
            what = f"leaves rows of {rows.key} that neither the base nor the adapter has"
            problems.append(Problem(where, what, _OTHER_BASE, got=f"row {gap[0]}"))
    lengths = {key: found[key].shape[0] if key in found else base.info(key).shape[0] for key in _vocabulary(base)}
    if found and len(set(lengths.values())) > 1:
        got = ", ".join(f"{key} {length}" for key, length in lengths.items())
        problems.append(Problem(where, "embedding and head would differ in their rows", "save the adapter again", got))
    return problems


def _vocabulary(base: CheckpointReader) -> list[str]:
    return [key for key in (EMBEDDING, HEAD) if base.holds(key)]


def vocab_size(base: CheckpointReader, rows: Mapping[str, TokenRows]) -> int:
    """Rows of the merged embedding."""
    return rows[EMBEDDING].shape[0] if EMBEDDING in rows else int(base.config["vocab_size"])


def check_tokenizer(tokenizer: Any, folder: str, size: int, adapter: Adapter) -> None:
    """Raise WeightsError for a tokenizer with ids outside the merged model, or with other ids than were trained."""
    problems = []
    highest = max(tokenizer.get_vocab().values())
    if highest >= size:
        do = "the tokenizer and the model do not belong together"
        got = f"id {highest} for {size} entries"
        problems.append(Problem(folder, "a token is outside the model's vocabulary", do, got))
    trained = {token for tokens in adapter.tokens.values() for token in tokens}
    for token, number in adapter.added_tokens.items():
        found = tokenizer.get_vocab().get(token)
        if found != number or number not in trained:
            what = f"the adapter was trained with {token} as token {number}"
            do = "copy the whole adapter folder of the run, its tokenizer included"
            got = "no such token here" if found is None else f"token {found} here, and rows of {sorted(trained)[:5]}"
            problems.append(Problem(folder, what, do, got))
    unknown = sorted(trained - set(tokenizer.get_vocab().values()))
    if unknown:
        what, do = "the adapter has rows of tokens that this tokenizer lacks", "give the adapter folder its tokenizer"
        problems.append(Problem(folder, what, do, got=f"token {unknown[0]}"))
    if problems:
        raise WeightsError(problems)
