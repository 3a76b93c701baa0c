"""Routing decisions of base + adapters, replayed in the merged model by layer and prompt.

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
    """The choices of a model by layer and prompt; and how many of them another model would have made otherwise.

    `experts_module` as in the table of families: what chooses stands in the block around it. A choice is of an expert
    or, where the router first chooses among groups of experts, of a group.
    """

    experts_module: str
    kept: dict[tuple[int, int], list[torch.Tensor]] = field(default_factory=dict)
    decisions: int = 0
    differing: int = 0

    @contextmanager
    def record(self, layer: int, prompt: int, module: nn.Module) -> Iterator[None]:
        """Record the decisions of decoder layer `module` in the block."""
        self.kept[layer, prompt] = []
        with self._within(module, _Choosing(self, self.kept[layer, prompt], replay=False)):
            yield

    @contextmanager
    def replay(self, layer: int, prompt: int, module: nn.Module) -> Iterator[None]:
        """Replay the recorded decisions in `module`, and count where its own would have been different."""
        with self._within(module, _Choosing(self, self.kept[layer, prompt], replay=True)):
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

    def count(self, own: torch.Tensor, kept: torch.Tensor, axis: int, size: int) -> None:
        """Two choices of the same kind, as indices along `axis`, whose order does not matter."""
        shape = list(own.shape)
        shape[axis] = size
        chosen = torch.zeros(shape).scatter_(axis, own, 1.0)
        self.decisions += kept.numel()
        self.differing += kept.numel() - int(chosen.gather(axis, kept).sum())


class _Choosing(TorchDispatchMode):  # type: ignore[misc]
    """Records or replays every decision whose axis is kept; a maximum without its axis only scores a group."""

    def __init__(self, routing: Routing, kept: list[torch.Tensor], replay: bool) -> None:
        super().__init__()
        self.routing, self.kept, self.replay, self.position = routing, kept, replay, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own = func(*args, **(kwargs or {}))
        axis = decision_axis(func, args, kwargs or {})
        if axis is None or own[1].dim() != args[0].dim():
            return own
        if not self.replay:
            self.kept.append(own[1])
            return own
        index = self.kept[self.position]
        self.position += 1
        self.routing.count(own[1], index, axis, args[0].shape[axis])
        return replay_decision(args[0], index, axis)
