"""The base weights of a merge: the 16-bit checkpoint, or the values that 4-bit training used.

Packages that run or quantise a model are imported where they are used: `finetune inspect` prepares a merge, too.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.adapters.lineage import Weighted
from finetune.adapters.record import RECORD_FILE
from finetune.adapters.whole_tensors import TokenRows
from finetune.checkpoint import CheckpointReader
from finetune.errors import Problem, WeightsError
from finetune.merge.routing_replay import Routing
from finetune.moe.families import Family

if TYPE_CHECKING:
    from finetune.merge.layerwise import LayerwiseModel

INTO = ("original", "dequantized")
_INTO_ORIGINAL = "merge --into original (the default)"


def open_base(
    plain: CheckpointReader, family: Family, adapters: Sequence[Weighted], into: str, fingerprint: str
) -> CheckpointReader:
    """The base that the changes are added to; `fingerprint` is that of `plain`, the checkpoint on disk.

    Raises WeightsError for a checkpoint that would not load, and where training saw another base than is asked for.
    """
    from finetune.moe.preflight import check_loadable

    check_loadable(plain, family.transformers_class(), load_in_4bit=False)
    if into == "original":
        _check_dequantized_chain(adapters, fingerprint)
        return plain
    from finetune.merge.dequantized_base import DequantizedReader

    return DequantizedReader(plain.folder, family, trained_dtype(adapters, fingerprint))


def _check_dequantized_chain(adapters: Sequence[Weighted], fingerprint: str) -> None:
    """An adapter that was trained on a merge into the dequantised base does not go onto the 16-bit one."""
    what = "was trained on a merge into the dequantised base; this merge is into the 16-bit base"
    problems = [
        Problem(str(weighted.adapter.folder), what, "merge it into that merged checkpoint, with --base")
        for weighted in adapters
        if weighted.adapter.base_fingerprint not in (None, fingerprint)
        and weighted.adapter.base_made_from is not None
        and weighted.adapter.base_made_from.into == "dequantized"
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
) -> "LayerwiseModel":
    """Base + adapters as training had them; where the base is read from NF4, as the training's own loader makes it.

    `over` gives a reader of the base the shapes that the adapters need.
    """
    from finetune.merge.dequantized_base import DequantizedReader
    from finetune.merge.layerwise import LayerwiseModel, QuantizedModel

    if not isinstance(opened, DequantizedReader):
        return LayerwiseModel(over(opened), config, adapters, routing, token_rows)
    return QuantizedModel(opened.dtype, over(CheckpointReader(opened.folder)), config, adapters, routing, token_rows)


def trained_dtype(adapters: Sequence[Weighted], fingerprint: str) -> torch.dtype:
    """The type of the computation that all adapters were trained in, on this base in 4 bits.

    Raises WeightsError for an adapter that saw its base otherwise, or saw another base.
    """
    problems = [problem for weighted in adapters if (problem := _not_seen(weighted, fingerprint))]
    if problems:
        raise WeightsError(problems)
    dtypes = sorted({str(weighted.adapter.record.dtype) for weighted in adapters})
    if len(dtypes) > 1:
        what = "the adapters were trained with different compute dtypes, so their 4-bit bases differ"
        raise WeightsError(Problem("adapters", what, "merge one after the other", ", ".join(dtypes)))
    dtype: torch.dtype = getattr(torch, dtypes[0])
    return dtype


def _not_seen(weighted: Weighted, fingerprint: str) -> Problem | None:
    """Why the dequantised base is not what an adapter was trained on, if it is not."""
    where, record = str(Path(weighted.adapter.folder) / RECORD_FILE), weighted.adapter.record
    if not record.says_quantization:
        return Problem(where, "does not record whether the base was quantised in training", _INTO_ORIGINAL)
    if record.quantization != "nf4":
        what = "the adapter was trained on the 16-bit base, and never saw a dequantised one"
        return Problem(where, what, _INTO_ORIGINAL, got=str(record.quantization))
    if record.dtype not in ("float32", "bfloat16", "float16"):
        return Problem(where, "does not record the compute dtype", _INTO_ORIGINAL, record.dtype)
    if weighted.adapter.base_fingerprint not in (None, fingerprint):
        what = "the adapter was trained on a merged checkpoint in 4 bits, not on this base in 4 bits"
        return Problem(where, what, "merge one after the other")
    return None
