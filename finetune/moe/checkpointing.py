"""Non-reentrant activation checkpointing that keeps the forward's routing for the recompute.

Two router scores may be so close that the recompute, whose sums run in another order, would choose another expert
(pytorch#171355). The outputs of `topk` are therefore saved and replayed; everything else is computed again. Reentrant
checkpointing is never used: it leaves the balance term without a gradient while its value is still logged.
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts


def _keep_routing(_context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    is_topk = op is torch.ops.aten.topk.default
    return CheckpointPolicy.MUST_SAVE if is_topk else CheckpointPolicy.PREFER_RECOMPUTE


def enable_checkpointing(model: Any) -> None:
    """Checkpoint each decoder layer of a transformers model (also under an adapter)."""
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={
            "use_reentrant": False,
            "context_fn": partial(create_selective_checkpoint_contexts, _keep_routing),
        }
    )
