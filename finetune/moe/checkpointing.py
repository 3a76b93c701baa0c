"""Non-reentrant activation checkpointing that keeps the forward's routing for the recompute.

Two router scores may be so close that the recompute, whose sums may run in another order, would choose another
expert (pytorch#171355). The indices of every `topk` are therefore kept and chosen again; all else is computed anew.
torch's own selective checkpointing cannot do it: Mixtral divides the values of `topk` in place, which it refuses.
Reentrant checkpointing is never used: it leaves the balance term without a gradient while its value is still logged.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.return_types import topk as topk_result

_TOPK = (torch.topk, torch.Tensor.topk)


class _KeptTopk(TorchFunctionMode):
    """Replaces `topk` within one checkpointed block: indices first, then `gather` for values and gradient.

    The forward chooses indices and appends them to `kept`; the recompute takes them from there. Both save the same
    tensors for the backward, as checkpointing demands.
    """

    def __init__(self, kept: list[torch.Tensor], replay: bool) -> None:
        super().__init__()
        self.kept, self.replay, self.position = kept, replay, 0

    def __enter__(self) -> "_KeptTopk":
        self.position = 0
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return self._topk(*args, **kwargs) if func in _TOPK else func(*args, **kwargs)

    def _topk(self, scores: torch.Tensor, k: int, dim: int = -1, *args: Any, **kwargs: Any) -> Any:
        if not self.replay:
            self.kept.append(scores.detach().topk(k, dim, *args, **kwargs).indices)
        indices = self.kept[self.position]
        self.position += 1
        return topk_result((scores.gather(dim, indices), indices))


def kept_routing() -> tuple[_KeptTopk, _KeptTopk]:
    """The pair of contexts (forward, recompute) of one checkpointed block."""
    kept: list[torch.Tensor] = []
    return _KeptTopk(kept, replay=False), _KeptTopk(kept, replay=True)


def enable_checkpointing(model: Any) -> None:
    """Checkpoint each decoder layer of a transformers model (also under an adapter)."""
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": kept_routing})
