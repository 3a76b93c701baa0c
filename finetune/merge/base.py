"""Which base a merge adds to: the 16-bit checkpoint, or the one that 4-bit training saw."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.adapters.lineage import Weighted
from finetune.adapters.record import RECORD_FILE
from finetune.adapters.vocabulary import TokenRows
from finetune.checkpoint import CheckpointReader
from finetune.errors import Problem, WeightsError
from finetune.merge.dequantized import DequantizedReader
from finetune.merge.logits import LayerwiseModel
from finetune.merge.reference import QuantizedModel
from finetune.merge.routing import Routing
from finetune.moe.families import Family
from finetune.moe.preflight import rehearse

INTO = ("original", "dequantized")
_INTO_ORIGINAL = "merge --into original (the default)"


def open_base(
    plain: CheckpointReader, family: Family, adapters: Sequence[Weighted], into: str, fingerprint: str
) -> CheckpointReader:
    """The base that the changes are added to; `fingerprint` is that of `plain`, the checkpoint on disk.

    Raises WeightsError for a checkpoint that would not load, and where training saw another base than is asked for.
    """
    rehearse(plain, family.transformers_class(), load_in_4bit=False)
    if into == "original":
        _check_dequantized_chain(adapters, fingerprint)
        return plain
    return DequantizedReader(plain.folder, family, trained_dtype(adapters, fingerprint))


def _check_dequantized_chain(adapters: Sequence[Weighted], fingerprint: str) -> None:
    """An adapter that was trained on a merge into the dequantised base does not go onto the 16-bit one."""
    what = "was trained on a merge into the dequantised base; this merge is into the 16-bit base"
    problems = [
        Problem(str(each.adapter.folder), what, "merge it into that merged checkpoint, with --base")
        for each in adapters
        if each.adapter.base_fingerprint not in (None, fingerprint)
        and each.adapter.base_made_from is not None
        and each.adapter.base_made_from.into == "dequantized"
    ]
    if problems:
        raise WeightsError(problems)


def reference_model(
    opened: CheckpointReader,
    over: Callable[[CheckpointReader], CheckpointReader],
    config: dict[str, Any],
    adapters: Sequence[Weighted],
    routing: Routing | None,
    token_rows: Mapping[str, TokenRows],
) -> LayerwiseModel:
    """Base + adapters as training had them; where the base is read from NF4, as the training's own loader makes it.

    `over` gives a reader of the base the shapes that the adapters need.
    """
    if not isinstance(opened, DequantizedReader):
        return LayerwiseModel(over(opened), config, adapters, routing, token_rows)
    return QuantizedModel(opened.dtype, over(CheckpointReader(opened.folder)), config, adapters, routing, token_rows)


def trained_dtype(adapters: Sequence[Weighted], fingerprint: str) -> torch.dtype:
    """The type of the computation that all adapters were trained in, on this base in 4 bits.

    Raises WeightsError for an adapter that saw its base otherwise, or saw another base.
    """
    problems = [problem for each in adapters if (problem := _not_seen(each, fingerprint))]
    if problems:
        raise WeightsError(problems)
    found = sorted({str(each.adapter.record.dtype) for each in adapters})
    if len(found) > 1:
        what = "the adapters were trained with different compute dtypes, so their 4-bit bases differ"
        raise WeightsError(Problem("adapters", what, "merge one after the other", ", ".join(found)))
    dtype: torch.dtype = getattr(torch, found[0])
    return dtype


def _not_seen(each: Weighted, fingerprint: str) -> Problem | None:
    """Why the dequantised base is not what an adapter was trained on, if it is not."""
    where, record = str(Path(each.adapter.folder) / RECORD_FILE), each.adapter.record
    if not record.says_quantization:
        return Problem(where, "does not say how the base was stored in training", _INTO_ORIGINAL)
    if record.quantization != "nf4":
        what = "the adapter was trained on the 16-bit base, and never saw a dequantised one"
        return Problem(where, what, _INTO_ORIGINAL, got=str(record.quantization))
    if record.dtype not in ("float32", "bfloat16", "float16"):
        return Problem(where, "does not say in which number format was computed", _INTO_ORIGINAL, record.dtype)
    if each.adapter.base_fingerprint not in (None, fingerprint):
        what = "the adapter was trained on a merged checkpoint in 4 bits, not on this base in 4 bits"
        return Problem(where, what, "merge one after the other")
    return None
