"""Which experts a model chose, kept so that another model chooses the same ones.

Two router scores may be so close that rounding a weight to 16 bits chooses another expert; what follows differs then,
though every weight is right. So logits are also compared under equal choices, and other choices are counted.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.return_types import max as max_result
from torch.return_types import topk as topk_result

# Where the axis stands among the arguments of the two functions that routers choose with.
_AXIS = {torch.topk: 2, torch.Tensor.topk: 2, torch.max: 1, torch.Tensor.max: 1}


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
        """Keep what decoder layer `module` chooses in the block."""
        self.kept[layer, prompt] = []
        with self._within(module, _Choosing(self, self.kept[layer, prompt], replay=False)):
            yield

    @contextmanager
    def replay(self, layer: int, prompt: int, module: nn.Module) -> Iterator[None]:
        """Let `module` choose again what was kept, and count where by itself it would have chosen otherwise."""
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


class _Choosing(TorchFunctionMode):
    """Every `topk`, and every `max` along an axis that it keeps, is a choice: kept, or made again as it was kept.

    A choice made again has the kept indices and this model's own values at them.
    """

    def __init__(self, routing: Routing, kept: list[torch.Tensor], replay: bool) -> None:
        super().__init__()
        self.routing, self.kept, self.replay, self.position = routing, kept, replay, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        own = func(*args, **kwargs)
        if not isinstance(own, topk_result | max_result) or own.indices.dim() != args[0].dim():
            return own
        if not self.replay:
            self.kept.append(own.indices)
            return own
        place = _AXIS[func]
        axis = kwargs.get("dim", args[place] if len(args) > place else -1)
        indices = self.kept[self.position]
        self.position += 1
        self.routing.count(own.indices, indices, axis, args[0].shape[axis])
        return type(own)((args[0].gather(axis, indices), indices))
