"""TRL's fused head, fitted: positions of the supervised tokens from the batch, and smaller tiles on a CPU.

It cuts the logits into tiles of 4,096 tokens and 32,768 entries, of which on the CPU eight are in memory at once, so
that the head would need nearly three times the memory of a full logits tensor, and take five times as long
(`benchmarks/LOG.md`).

T tokens, N of them supervised, H hidden.
"""

from functools import wraps
from types import FunctionType, MethodType
from typing import Any

import torch

from finetune.upstream import changed

TILE = 512
"""Entries of the vocabulary in a tile on the CPU: 8 MB with 4,096 tokens in float32."""


def fit_head(model: Any) -> None:
    """Let a model, to which TRL has added its fused head, take `supervised` positions; on a CPU, also smaller tiles.

    `supervised` are the flattened positions of labels that are not -100, `[N]`. TRL would find them by a mask, which
    waits for the device three times in each micro-batch. The head stays TRL's own function, with its handling of
    architectures; the globals that it reads are replaced, for this model only. Raises UpstreamError where another
    release of TRL no longer looks them up.
    """
    added: Any = model.forward.__func__
    names = dict(added.__globals__)
    log_probs = _SupervisedLogProbs(names.get("_ChunkedLogProbFunction"))
    replaced: dict[str, Any] = {"_ChunkedLogProbFunction": log_probs, "_use_triton": log_probs.by_mask}
    if next(model.parameters()).device.type == "cpu":
        replaced["_CHUNKED_LOGPROB_CHUNK_SIZE"] = TILE
    if missing := replaced.keys() - (names.keys() & set(added.__code__.co_names)):
        raise changed("trl", "add_fused_lm_head", f"no longer reads {' and '.join(sorted(missing))}")
    fitted = FunctionType(added.__code__, names | replaced, added.__name__, added.__defaults__, added.__closure__)
    fitted.__kwdefaults__ = added.__kwdefaults__

    @wraps(added)
    def forward(self: Any, *args: Any, supervised: torch.Tensor | None = None, **kwargs: Any) -> Any:
        log_probs.positions = supervised
        try:
            return fitted(self, *args, **kwargs)
        finally:
            log_probs.positions = None

    model.forward = MethodType(forward, model)


class _SupervisedLogProbs:
    """Replaces TRL's autograd function: computes the log-probabilities at `positions` alone, if they are set."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.positions: torch.Tensor | None = None

    def by_mask(self, _device: torch.device) -> bool:
        """Replaces the check for Triton, which decides whether TRL itself selects the supervised tokens by a mask."""
        return self.positions is None

    def apply(self, hidden: torch.Tensor, weight: Any, bias: Any, labels: torch.Tensor, *settings: Any) -> Any:
        """TRL's figures of each token of `hidden` `[T, H]`, 0 outside of the positions."""
        if self.positions is None:
            return self.function.apply(hidden, weight, bias, labels, *settings)
        positions = self.positions
        selected = hidden.index_select(0, positions), weight, bias, labels.index_select(0, positions)
        values = self.function.apply(*selected, *settings)
        return tuple(
            None if value is None else value.new_zeros(len(hidden)).index_copy(0, positions, value) for value in values
        )
