"""Whole tensors that an adapter brings in place of the base's, and a head of its own for a base that has none.

PEFT saves modules that were trained whole (`modules_to_save`), and embedding and head as they were where they have
factors or more rows than the base. A base with one matrix for embedding and head (`tie_word_embeddings`) computes under
an adapter of one of them what only two matrices can hold; PEFT's own merge then changes both. V rows, H hidden.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig

from finetune.adapters.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from finetune.adapters.contents import EMBEDDING, HEAD, PREFIX
from finetune.adapters.layout import base_layout
from finetune.adapters.lineage import Weighted
from finetune.adapters.targets import old_name
from finetune.checkpoint import CheckpointReader, TensorInfo, TensorSpec
from finetune.checkpoint.reader import TORCH_DTYPES, read_tensor
from finetune.errors import Problem, WeightsError
from finetune.moe.families import Family

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
    tied = bool(AutoConfig.for_model(**base.config).tie_word_embeddings)
    whole: dict[str, TensorInfo] = {}
    trained: set[str] = set()
    problems: list[Problem] = []
    for weighted in adapters:
        found = _fitting(base, weighted.adapter, family, tied, problems)
        if found and weighted.weight != 1:
            what, do = "brings whole tensors, which cannot be weighted", "give it weight 1"
            problems.append(Problem(str(weighted.adapter.folder), what, do, f"{weighted.weight:g}"))
        if twice := sorted(found.keys() & whole.keys()):
            what, do = "more than one adapter brings this tensor whole", "merge one after the other"
            problems.append(Problem(str(weighted.adapter.folder), what, do, twice[0]))
        whole |= found
        trained |= {key for key in found if weighted.adapter.trains_whole(key)}
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
    found = {}
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
            found[key] = info
    return found


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
