"""Tensors and rows that an adapter replaces in the base, instead of adding a low-rank change.

- Whole modules (`modules_to_save`), and embedding and head where PEFT saves them because they have factors or more rows
  than the base. A base with tied embeddings needs two matrices where only one of them is changed; PEFT's own merge
  changes both.
- Rows of added tokens in embedding and head.
- Correction biases of routers that training changed; they lie beside the adapter.

V rows of a matrix, n rows in the adapter, H hidden.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune.adapters.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from finetune.adapters.lineage import Weighted
from finetune.adapters.targets import base_layout, old_name
from finetune.adapters.tensors import EMBEDDING, HEAD, PREFIX
from finetune.checkpoint import CheckpointReader, TensorInfo, TensorSpec
from finetune.checkpoint.reader import TORCH_DTYPES, read_header, read_tensor
from finetune.errors import Problem, WeightsError
from finetune.model_files import build_config
from finetune.moe.families import Family
from finetune.moe.router_bias import BIAS_FILE, find_biases

ROWS_AT_A_TIME = 4096
VOCABULARY = {EMBEDDING.removesuffix(".weight"), HEAD.removesuffix(".weight")}
_OTHER_BASE = "merge into the base it was trained on"


class ReplacedBase(CheckpointReader):
    """A base of which some tensors lie elsewhere: `whole` in an adapter's file, and maybe the head, in the embedding.

    `base` is what the others are read through. `trained`: those of `whole` that were trained so, and not only saved.
    """

    def __init__(
        self, base: CheckpointReader, whole: Mapping[str, TensorInfo], trained: Collection[str], untied: bool
    ) -> None:
        self.folder, self._base, self.whole, self.untied = base.folder, base, dict(whole), untied
        self._trained = trained
        self._takes_embedding = untied and not base.holds(HEAD) and HEAD not in self.whole
        self.keys = [*base.keys, *([HEAD] if untied and not base.holds(HEAD) else [])]

    def info(self, key: str) -> TensorInfo:
        """Where `key` lies, be it in an adapter."""
        if key in self.whole:
            return replace(self.whole[key], key=key)
        return replace(self._base.info(self._source(key)), key=key)

    def holds(self, key: str) -> bool:
        """Whether there is a tensor of this name."""
        return key in self.whole or self._base.holds(self._source(key))

    def read(self, key: str) -> torch.Tensor:
        """The whole tensor in its own dtype."""
        return read_tensor(self.whole[key]) if key in self.whole else self._base.read(self._source(key))

    def read_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` (of all axes but the last, as one), without reading the others."""
        if key in self.whole:
            return read_tensor(self.whole[key].as_rows(), start, stop)
        return self._base.read_rows(self._source(key), start, stop)

    def _source(self, key: str) -> str:
        return EMBEDDING if key == HEAD and self._takes_embedding else key

    @property
    def config(self) -> dict[str, Any]:
        """`config.json` of the base, for these tensors."""
        config = dict(self._base.config)
        if EMBEDDING in self.whole:
            config["vocab_size"] = self.whole[EMBEDDING].shape[0]
        return config | ({"tie_word_embeddings": False} if self.untied else {})

    def over(self, base: CheckpointReader) -> "ReplacedBase":
        """The same over another reader of the base."""
        return ReplacedBase(base, self.whole, self._trained, self.untied)

    def before(self) -> "ReplacedBase":
        """The base without what was trained whole, unless that makes it another size: what PEFT loads into."""
        kept = {
            key: info
            for key, info in self.whole.items()
            if key not in self._trained or info.shape != self._shape_before(key)
        }
        return ReplacedBase(self._base, kept, self._trained, self.untied)

    def _shape_before(self, key: str) -> tuple[int, ...]:
        return self._base.info(key if self._base.holds(key) else EMBEDDING).shape

    def in_own_formats(self, specs: Sequence[TensorSpec]) -> list[TensorSpec]:
        """What is written, with the base's number format for tensors that an adapter has in another."""
        kept = {key: self._base.info(key).dtype for key in self.whole if self._base.holds(key)}
        kept |= {HEAD: self._base.info(EMBEDDING).dtype} if HEAD in self.whole and HEAD not in kept else {}
        return [replace(spec, dtype=kept.get(spec.key, spec.dtype)) for spec in specs]


def with_replaced(base: CheckpointReader, adapters: Sequence[Weighted], family: Family) -> CheckpointReader:
    """The base as the adapters' factors are added to it: `base` itself where they bring no whole tensor.

    Raises WeightsError for tensors that do not fit the base or each other.
    """
    tied = bool(build_config(base.config, base.folder).tie_word_embeddings)
    whole: dict[str, TensorInfo] = {}
    trained: set[str] = set()
    problems: list[Problem] = []
    for weighted in adapters:
        replacements = _fitting(base, weighted.adapter, family, tied, problems)
        if replacements and weighted.weight != 1:
            what, do = "brings whole tensors, which cannot be weighted", "give it weight 1"
            problems.append(Problem(str(weighted.adapter.folder), what, do, f"{weighted.weight:g}"))
        if twice := sorted(replacements.keys() & whole.keys()):
            what, do = "more than one adapter brings this tensor whole", "merge one after the other"
            problems.append(Problem(str(weighted.adapter.folder), what, do, twice[0]))
        whole |= replacements
        trained |= {key for key in replacements if weighted.adapter.trains_whole(key)}
    if problems:
        raise WeightsError(problems)
    factors = any(VOCABULARY & weighted.adapter.pairs.keys() for weighted in adapters)
    untied = tied and (factors or _become_two(whole, trained))
    if tied:
        whole = _of_tied(whole, trained, untied, base.holds(HEAD))
    if not whole and not untied:
        return base
    found_base = ReplacedBase(base, whole, trained, untied)
    _check_vocabulary(found_base, adapters)
    return found_base


def _fitting(
    base: CheckpointReader, adapter: Adapter, family: Family, tied: bool, problems: list[Problem]
) -> dict[str, TensorInfo]:
    """The whole tensors of an adapter that are not the base's own, by key on disk."""
    modules = base_layout(base, family).modules.items()
    keys = {f"{name}.weight": key for key, module in modules for name in (module, old_name(module, family))}
    infos = {}
    for name, info in adapter.whole.items():
        where = f"{adapter.folder / WEIGHTS_FILE}: {PREFIX}{name}"
        key = HEAD if name == HEAD else keys.get(name)
        if key is None or not (base.holds(key) or (key == HEAD and tied)):
            problems.append(Problem(where, "is for a tensor that the base does not have", _OTHER_BASE))
            continue
        shape = base.info(key if base.holds(key) else EMBEDDING).shape
        if info.shape != shape and (key not in (EMBEDDING, HEAD) or info.shape[1] != shape[1]):
            problems.append(
                Problem(where, "shape does not fit the base", _OTHER_BASE, f"{list(info.shape)} for {list(shape)}")
            )
        elif adapter.trains_whole(name) or not _is_copy(base, key if base.holds(key) else EMBEDDING, info):
            infos[key] = info
    return infos


def _is_copy(base: CheckpointReader, key: str, info: TensorInfo) -> bool:
    """Whether a saved tensor is the base's, as near as its number format can say."""
    own = base.info(key)
    if info.shape != own.shape:
        return False
    coarse = min((TORCH_DTYPES[own.dtype], TORCH_DTYPES[info.dtype]), key=lambda dtype: dtype.itemsize)
    for start in range(0, own.shape[0], ROWS_AT_A_TIME):
        stop = start + ROWS_AT_A_TIME
        if not torch.equal(base.read_rows(key, start, stop).to(coarse), read_tensor(info, start, stop).to(coarse)):
            return False
    return True


def _become_two(whole: Mapping[str, TensorInfo], trained: Collection[str]) -> bool:
    """Whether whole tensors alone make two matrices of a tied one: where one was trained, and the other not as it."""
    if EMBEDDING in whole and HEAD in whole:
        return not torch.equal(read_tensor(whole[EMBEDDING]), read_tensor(whole[HEAD]))
    return bool({EMBEDDING, HEAD} & set(trained))


def _of_tied(
    whole: dict[str, TensorInfo], trained: Collection[str], untied: bool, holds_head: bool
) -> dict[str, TensorInfo]:
    """What is replaced of a tied base: a saved copy, which nobody trained, is of the one matrix and so of both."""
    saved = [whole[key] for key in (EMBEDDING, HEAD) if key in whole and key not in trained]
    if saved:
        whole = {EMBEDDING: saved[0], HEAD: saved[0]} | whole
    if not untied and not holds_head:
        whole = {key: info for key, info in whole.items() if key != HEAD}
    return whole


def _check_vocabulary(base: ReplacedBase, adapters: Sequence[Weighted]) -> None:
    """Embedding and head must have equally many rows, and rows of single tokens a matrix of their own."""
    problems = []
    rows = {key: base.info(key).shape[0] for key in (EMBEDDING, HEAD) if base.holds(key)}
    if len(set(rows.values())) > 1:
        got = ", ".join(f"{key} {count}" for key, count in rows.items())
        what, do = "embedding and head would differ in their rows", "save the adapter again"
        problems.append(Problem(str(adapters[0].adapter.folder), what, do, got))
    for weighted in adapters:
        if weighted.adapter.rows and (base.untied or {EMBEDDING, HEAD} & base.whole.keys()):
            where = f"{weighted.adapter.folder / CONFIG_FILE}: trainable_token_indices"
            what = "rows of single tokens beside an embedding or head that is trained otherwise"
            problems.append(Problem(where, what, "merge one after the other"))
    if problems:
        raise WeightsError(problems)


_OTHER_BASE_ROWS = "merge into the base it was trained on"


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
    tied = bool(build_config(base.config, base.folder).tie_word_embeddings)
    rows_by_matrix: dict[str, TokenRows] = {}
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
                rows_by_matrix[name] = TokenRows(name, info, tokens, base.info(name).shape[0])
    problems += _length_problems(base, adapter, rows_by_matrix) if not problems else []
    problems += [
        Problem(str(adapter.folder), "has both factors and rows of one matrix", "save the adapter again", got=key)
        for key in sorted(set(rows_by_matrix) & set(changed))
    ]
    if problems:
        raise WeightsError(problems)
    return rows_by_matrix


def _misfit(base: CheckpointReader, adapter: Adapter, path: str, tokens: tuple[int, ...], tied: bool) -> Problem | None:
    """What is wrong with the rows of one matrix, if anything."""
    where, info, key = f"{adapter.folder / WEIGHTS_FILE}: {PREFIX}{path}", adapter.rows[path], f"{path}.weight"
    if key not in ((EMBEDDING,) if tied else (EMBEDDING, HEAD)) or not base.holds(key):
        return Problem(where, "rows of a matrix that the base does not have", _OTHER_BASE_ROWS)
    if info.shape != (len(tokens), base.info(key).shape[1]):
        got = f"{list(info.shape)} for {len(tokens)} tokens and rows of {base.info(key).shape[1]}"
        what = "the rows do not fit the base, or not the tokens that the settings name"
        return Problem(where, what, _OTHER_BASE_ROWS, got)
    return None


def _unnamed(adapter: Adapter, path: str) -> Problem:
    where = f"{adapter.folder / CONFIG_FILE}: trainable_token_indices"
    return Problem(where, "does not say which tokens the rows belong to", "save the adapter again", got=path)


def _without_rows(adapter: Adapter, name: str) -> Problem:
    where = str(adapter.folder / WEIGHTS_FILE)
    return Problem(where, "has no rows for a matrix that its settings name", "save the adapter again", got=name)


def _length_problems(
    base: CheckpointReader, adapter: Adapter, rows_by_matrix: Mapping[str, TokenRows]
) -> list[Problem]:
    """All matrices of the vocabulary must be as long as the longest, without a row that nobody has written."""
    where = f"{adapter.folder / CONFIG_FILE}: trainable_token_indices"
    problems = []
    for rows in rows_by_matrix.values():
        if gap := sorted(set(range(rows.base_rows, rows.shape[0])) - set(rows.tokens)):
            what = f"leaves rows of {rows.key} that neither the base nor the adapter has"
            problems.append(Problem(where, what, _OTHER_BASE_ROWS, got=f"row {gap[0]}"))
    lengths = {
        key: rows_by_matrix[key].shape[0] if key in rows_by_matrix else base.info(key).shape[0]
        for key in _vocabulary(base)
    }
    if rows_by_matrix and len(set(lengths.values())) > 1:
        got = ", ".join(f"{key} {length}" for key, length in lengths.items())
        problems.append(Problem(where, "embedding and head would differ in their rows", "save the adapter again", got))
    return problems


def _vocabulary(base: CheckpointReader) -> list[str]:
    return [key for key in (EMBEDDING, HEAD) if base.holds(key)]


def vocab_size(base: CheckpointReader, rows: Mapping[str, TokenRows]) -> int:
    """Rows of the merged embedding."""
    return rows[EMBEDDING].shape[0] if EMBEDDING in rows else int(build_config(base.config, base.folder).vocab_size)


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
        actual = tokenizer.get_vocab().get(token)
        if actual != number or number not in trained:
            what = f"the adapter was trained with {token} as token {number}"
            do = "copy the whole adapter folder of the run, its tokenizer included"
            got = "no such token here" if actual is None else f"token {actual} here, and rows of {sorted(trained)[:5]}"
            problems.append(Problem(folder, what, do, got))
    unknown = sorted(trained - set(tokenizer.get_vocab().values()))
    if unknown:
        what, do = "the adapter has rows of tokens that this tokenizer lacks", "give the adapter folder its tokenizer"
        problems.append(Problem(folder, what, do, got=f"token {unknown[0]}"))
    if problems:
        raise WeightsError(problems)


def bias_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Where the moved biases of an adapter folder lie, by their names in the loaded model; empty where none are."""
    return read_header(folder / BIAS_FILE) if (folder / BIAS_FILE).is_file() else {}


def fixed_tensors(base: CheckpointReader, folder: Path, family: Family) -> dict[str, TensorInfo]:
    """The correction biases of the merged model by their keys on disk, moved or not; their number format is kept.

    They are added to scores that differ by little: rounded to 16 bits they would choose other experts.
    Raises WeightsError unless the base has each one that was moved, in the same shape.
    """
    name = None if family.moe is None else family.moe.disk_correction_bias
    tensors = {key: base.info(key) for key in base.keys if name is not None and key.endswith(f".{name}")}
    for name, info in bias_tensors(folder).items():
        key = _disk_name(name, family)
        if not base.holds(key) or base.info(key).shape != info.shape:
            what, do = "these correction biases are not this base's", "merge into the base it was trained on"
            raise WeightsError(Problem(str(folder / BIAS_FILE), what, do, got=f"{name} {list(info.shape)}"))
        tensors[key] = info
    return tensors


def _disk_name(name: str, family: Family) -> str:
    moe = family.moe
    if moe is None or moe.correction_bias is None or not name.endswith(f".{moe.correction_bias}"):
        return name
    return name.removesuffix(moe.correction_bias) + str(moe.disk_correction_bias)


@contextmanager
def moved_biases(model: torch.nn.Module, biases: dict[str, TensorInfo], family: Family) -> Iterator[None]:
    """Within it those of the biases that `model` holds have their moved values."""
    model_biases = {} if family.moe is None or not biases else find_biases(model, family.moe)
    held = {name: bias for name, bias in model_biases.items() if name in biases}
    own = {name: bias.data for name, bias in held.items()}
    for name, bias in held.items():
        bias.data = read_tensor(biases[name]).view_as(bias)
    try:
        yield
    finally:
        for name, bias in held.items():
            bias.data = own[name]
