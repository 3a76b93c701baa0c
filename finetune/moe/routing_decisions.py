"""Routing decisions: which operations make them, and how a recorded one is replayed.

Two router scores may be so close that a forward whose sums run in another order (pytorch#171355), or whose weights are
rounded otherwise, chooses another expert. The recompute of checkpointing and the proof of a merge therefore replay the
indices that a forward chose. Both see operations below autograd, through a `TorchDispatchMode`. Each records in its own
place: checkpointing among the other values that it keeps of a block, in the order in which they were made
(`finetune.moe.checkpointing`), the proof by layer and prompt, for a model that is loaded later (`finetune.merge`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

_aten = torch.ops.aten
# The operations that routers choose with, and which of their arguments is the axis.
_AXIS_ARGUMENT = {_aten.topk.default: 2, _aten.max.dim: 1}


def decision_axis(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """The axis along which `func` chooses; None for an operation that chooses nothing."""
    if func not in _AXIS_ARGUMENT:
        return None
    place = _AXIS_ARGUMENT[func]
    axis: int = kwargs.get("dim", args[place] if len(args) > place else -1)
    return axis


def replay_decision(scores: torch.Tensor, index: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the operation would return if it chose `index`: the values of `scores` there, and `index`."""
    if index.dim() == scores.dim():
        return scores.gather(axis, index), index
    return scores.gather(axis, index.unsqueeze(axis)).squeeze(axis), index
