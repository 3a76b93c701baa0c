"""Routing decisions of base + adapters, replayed in the merged model by layer.

Rounding a weight to 16 bits can flip a near tie between two experts; all later values then differ although every weight
is right. So logits are also compared under equal decisions, and flipped decisions are counted.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from finetune.moe.routing_decisions import decision_axis, replay_decision
from finetune.upstream import private

TorchDispatchMode: Any = private("torch.utils._python_dispatch:TorchDispatchMode")


@dataclass
class Routing:
    """The choices of a model by layer, for one batch; and how many of them another model would have made otherwise.

    `experts_module` as in the table of families: what chooses stands in the block around it. A choice is of an expert
    or, where the router first chooses among groups of experts, of a group.
    """

    experts_module: str
    kept: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    decisions: int = 0
    differing: int = 0

    @contextmanager
    def record(self, layer: int, module: nn.Module) -> Iterator[None]:
        """Record the decisions of decoder layer `module` in the block."""
        self.kept[layer] = []
        with self._within(module, _Choosing(self, self.kept[layer])):
            yield

    @contextmanager
    def replay(self, layer: int, module: nn.Module, real: torch.Tensor) -> Iterator[None]:
        """Replay the recorded decisions in `module`, and count where its own would have been different.

        `real` [B, T] is False for padding, whose decisions are replayed and not counted.
        """
        with self._within(module, _Choosing(self, self.kept[layer], real)):
            yield

    @contextmanager
    def _within(self, layer: nn.Module, choosing: "_Choosing") -> Iterator[None]:
        """`choosing` is in force while the MoE block of the layer runs, if it has one; attention is left alone."""
        block = layer.get_submodule(self.experts_module.rpartition(".")[0])
        if not hasattr(block, self.experts_module.rpartition(".")[2]):
            yield
            return
        within = ExitStack()
        handles = (
            block.register_forward_pre_hook(lambda *_: within.enter_context(choosing) and None),
            block.register_forward_hook(lambda *_: within.close(), always_call=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def count(self, own: torch.Tensor, kept: torch.Tensor, axis: int, size: int, real: torch.Tensor) -> None:
        """Two choices of the same kind, as indices along `axis`, whose order does not matter."""
        shape = list(own.shape)
        shape[axis] = size
        chosen = torch.zeros(shape).scatter_(axis, own, 1.0)
        agreeing = chosen.gather(axis, kept).bool()
        counted = _as_shaped(real, kept)
        self.decisions += int(counted.sum())
        self.differing += int((counted & ~agreeing).sum())


def _as_shaped(real: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """`real` [B, T] for every choice in `kept`, whose shape begins with [B, T] or with [B * T]."""
    if kept.shape[:2] != real.shape:
        real = real.flatten()
    return real.reshape(*real.shape, *[1] * (kept.dim() - real.dim())).expand_as(kept)


class _Choosing(TorchDispatchMode):  # type: ignore[misc]
    """Records every decision whose axis is kept (a maximum without its axis only scores a group); replays them and
    counts those of `real` tokens, if it is given."""

    def __init__(self, routing: Routing, kept: list[torch.Tensor], real: torch.Tensor | None = None) -> None:
        super().__init__()
        self.routing, self.kept, self.real, self.position = routing, kept, real, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own = func(*args, **(kwargs or {}))
        axis = decision_axis(func, args, kwargs or {})
        if axis is None or own[1].dim() != args[0].dim():
            return own
        if self.real is None:
            self.kept.append(own[1])
            return own
        index = self.kept[self.position]
        self.position += 1
        self.routing.count(own[1], index, axis, args[0].shape[axis], self.real)
        return replay_decision(args[0], index, axis)
