"""Non-reentrant activation checkpointing that keeps the routing, and optionally the results of expensive ops.

Routing decisions are kept and replayed in both modes (`finetune.moe.routing_decisions`):

- `full`: everything else of a layer is recomputed in the backward.
- `selective`: the results of matrix products (4-bit linear layers included) and attention are kept as well, and the
  tensors that the experts' backward needs; norms, activations, rotary embeddings, the second product of an adapter and
  similar operations are recomputed.

torch's own selective checkpointing counts the calls of every operation, so that it cannot leave out a part of the
recompute, as the experts do here. Reentrant checkpointing is never used: it leaves the balance term without a gradient
while its value is still logged.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import bitsandbytes  # noqa: F401  registers its operations
import torch

from finetune.moe.routing_decisions import decision_axis, replay_decision
from finetune.recipe.settings import Recomputation
from finetune.upstream import private

_unsafe_view = private("torch:ops.aten._unsafe_view.default")
_ExcludeKey = private("torch:_C._SetExcludeDispatchKeyGuard")
_DispatchKey = private("torch:_C.DispatchKey")
_tree_leaves = private("torch.utils._pytree:tree_leaves")
_tree_map_only = private("torch.utils._pytree:tree_map_only")
TorchDispatchMode: Any = private("torch.utils._python_dispatch:TorchDispatchMode")


_aten = torch.ops.aten
_PRODUCTS = frozenset({_aten.mm.default, _aten.addmm.default})
_CHEAP_TERMS = 64  # a product with an inner dimension up to this is cheaper to recompute than to keep (an adapter's B)
SAVED_OPS = frozenset(
    {
        *_PRODUCTS,
        private("torch:ops.bitsandbytes.gemm_4bit.default"),
        private("torch:ops.aten._scaled_dot_product_flash_attention.default"),
        private("torch:ops.aten._scaled_dot_product_efficient_attention.default"),
        private("torch:ops.aten._scaled_dot_product_cudnn_attention.default"),
        private("torch:ops.aten._scaled_dot_product_flash_attention_for_cpu.default"),
    }
)


class Kept:
    """The values that one checkpointed block keeps from its forward, in the order in which they were computed."""

    def __init__(self, keeps_experts: bool) -> None:
        self.keeps_experts = keeps_experts
        self.replaying = False
        self.paused = False  # True while the experts run, which save their own tensors
        self._values: list[Any] = []
        self._position = 0

    def start(self, replaying: bool) -> None:
        """Begin the forward, or a recompute of it."""
        self.replaying, self._position = replaying, 0

    def once(self, make: Callable[[], Any]) -> Any:
        """The value of `make`, which is called in the forward only.

        Its tensors are kept without a copy, so changing them in place later is an error.
        """
        if not self.replaying:
            value = make()
            self._values.append((_detached(value), _versions(value)))
            return value
        value, versions = self._values[self._position]
        self._position += 1
        if _versions(value) != versions:
            raise RuntimeError("a tensor kept by checkpointing was changed in place; use gradient_checkpointing: none")
        return _detached(value)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is the value that was last kept, or taken from what is kept."""
        position = self._position if self.replaying else len(self._values)
        last = self._values[position - 1][0] if position else None
        return isinstance(last, torch.Tensor) and last.untyped_storage()._cdata == tensor.untyped_storage()._cdata

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Run operations whose results are not kept."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False


_running = threading.local()  # a recompute runs on the backward's own thread


def kept_values() -> Kept | None:
    """The values of the checkpointed block that this thread runs at the moment; None outside of one."""
    kept: Kept | None = getattr(_running, "kept", None)
    return kept


class _Checkpointed(TorchDispatchMode):  # type: ignore[misc]
    """Runs the forward (or the recompute) of one block with what it keeps."""

    def __init__(self, kept: Kept, saved_ops: frozenset[Any], replaying: bool) -> None:
        super().__init__()
        self.kept, self.saved_ops, self.replaying = kept, saved_ops, replaying

    def __enter__(self) -> "_Checkpointed":
        self.kept.start(self.replaying)
        self._outer, _running.kept = kept_values(), self.kept
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        _running.kept = self._outer
        super().__exit__(*exception)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        run = partial(func, *args, **(kwargs or {}))
        if self.kept.paused:
            return run()
        if (axis := decision_axis(func, args, kwargs or {})) is not None:
            return self._decide(run, args[0], axis)
        # A linear layer returns a view of its product in another shape, with a version counter of its own.
        is_view = func is _unsafe_view and self.kept.holds(args[0])
        return self.kept.once(run) if is_view or (func in self.saved_ops and not _is_cheap(func, args)) else run()

    def _decide(self, run: Callable[[], Any], scores: torch.Tensor, axis: int) -> Any:
        """The forward's decision; its values anew, as callers may change them in place."""
        if self.replaying:
            return replay_decision(scores, self.kept.once(run), axis)
        values, index = run()
        return values, self.kept.once(lambda: index)


def _is_cheap(func: Any, args: Sequence[Any]) -> bool:
    return func in _PRODUCTS and args[-2].shape[1] <= _CHEAP_TERMS


def _versions(value: Any) -> list[int]:
    return [leaf._version for leaf in _tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _detached(value: Any) -> Any:
    """The same memory and versions without the graph.

    Autograd gives the returned value a history; kept with it, a layer would reference itself through its graph, and a
    forward without a backward would never be freed.
    """
    # Below autograd a view has its own version, unless this key does its work (as in torch's own checkpointing).
    with _ExcludeKey(_DispatchKey.ADInplaceOrView, False):
        return _tree_map_only(torch.Tensor, torch.Tensor.detach, value)


def kept_routing(save_expensive: bool = False) -> tuple[_Checkpointed, _Checkpointed]:
    """The contexts (forward, recompute) of one block; `save_expensive`: also keep the results of `SAVED_OPS`."""
    kept = Kept(keeps_experts=save_expensive)
    saved_ops = SAVED_OPS if save_expensive else frozenset()
    return _Checkpointed(kept, saved_ops, replaying=False), _Checkpointed(kept, saved_ops, replaying=True)


def enable_checkpointing(model: Any, mode: Recomputation) -> None:
    """Checkpoint each decoder layer of a transformers model (also under an adapter) as `mode` says."""
    if mode == "none":
        model.activation_checkpointing_disable()
        return
    contexts = partial(kept_routing, save_expensive=mode == "selective")
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
