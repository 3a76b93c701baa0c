"""The element-wise step between the two projections of an expert, with its backward.

n rows, O features of the first projection (2I with a gate), I intermediate.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from finetune.upstream import private

_default_gate = private("transformers.integrations.moe:_default_apply_gate")


Again = tuple[torch.Tensor, torch.Tensor, Callable[[], torch.Tensor]]
"""`h [n, I]`, `<dh, h> [n]` in at least float32, and a function that computes `du [n, O]` from the weighted `dh`."""


class Gate(Protocol):
    """`h = gate(u)`."""

    def forward(self, u_nO: torch.Tensor) -> torch.Tensor:
        """`h [n, I]` in fresh memory."""
        ...

    def again(self, u_nO: torch.Tensor, dh_nI: torch.Tensor, weight_n: torch.Tensor) -> Again:
        """Recompute `h`, and its backward. `dh`, not yet times the row's `weight`, may be overwritten."""
        ...


class AnyGate:
    """Any gate function, differentiated by autograd."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.function = function

    def forward(self, u_nO: torch.Tensor) -> torch.Tensor:
        """`h`."""
        return self.function(u_nO)

    def again(self, u_nO: torch.Tensor, dh_nI: torch.Tensor, weight_n: torch.Tensor) -> Again:
        """`h` and its backward."""
        with torch.enable_grad():
            leaf_nO = u_nO.detach().requires_grad_()
            h_nI = self.function(leaf_nO)

        def backward() -> torch.Tensor:
            return torch.autograd.grad(h_nI, leaf_nO, dh_nI.mul_(weight_n[:, None]))[0]

        return h_nI.detach(), _row_products(dh_nI, h_nI.detach()), backward


class SiluGate:
    """`silu(gate) * up` of the halves of `u`, which most architectures use: half the passes over memory.

    On a GPU one kernel each for forward and backward (`fused.py`): torch's own ops are slower than the adapters.
    """

    def forward(self, u_nO: torch.Tensor) -> torch.Tensor:
        """`h`."""
        if _is_fused(u_nO):
            from finetune.moe.engine.fused import silu_forward

            return silu_forward(u_nO)
        gate_nI, up_nI = u_nO.chunk(2, dim=-1)
        return functional.silu(gate_nI).mul_(up_nI)

    def again(self, u_nO: torch.Tensor, dh_nI: torch.Tensor, weight_n: torch.Tensor) -> Again:
        """`h` and its backward."""
        if _is_fused(u_nO):
            from finetune.moe.engine.fused import silu_backward

            h_nI, gradient_n, made_nO = silu_backward(u_nO, dh_nI, weight_n)
            return h_nI, gradient_n, lambda: made_nO
        gate_nI, up_nI = u_nO.chunk(2, dim=-1)
        silu_nI = functional.silu(gate_nI)
        h_nI = silu_nI * up_nI

        def backward() -> torch.Tensor:
            dh_nI.mul_(weight_n[:, None])
            du_nO = torch.empty_like(u_nO)
            dgate_nI, dup_nI = du_nO.chunk(2, dim=-1)
            torch.mul(dh_nI, silu_nI, out=dup_nI)
            torch.ops.aten.silu_backward.grad_input(dh_nI.mul_(up_nI), gate_nI, grad_input=dgate_nI)
            return du_nO

        return h_nI, _row_products(dh_nI, h_nI), backward


def _row_products(a_nI: torch.Tensor, b_nI: torch.Tensor) -> torch.Tensor:
    """`<a, b>` of each row, summed in at least float32."""
    return (a_nI.to(sum_dtype(a_nI)) * b_nI).sum(-1)


def sum_dtype(x: torch.Tensor) -> torch.dtype:
    """Sums over experts and features are made in at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _is_fused(u_nO: torch.Tensor) -> bool:
    """Whether the fused kernels apply: 16 bits on a CUDA device with Triton (part of torch's CUDA wheels)."""
    return u_nO.is_cuda and u_nO.dtype.itemsize == 2 and u_nO.numel() > 0 and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def gate_of(module: Any) -> Gate:
    """The gate of an experts module of transformers."""
    if not module.has_gate:
        return AnyGate(module.act_fn)
    is_default = getattr(type(module), "_apply_gate", None) is _default_gate
    if is_default and type(module.act_fn) is type(ACT2FN["silu"]):
        return SiluGate()
    return AnyGate(module._apply_gate)
