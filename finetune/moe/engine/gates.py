"""The element-wise step between the two projections of an expert, with its backward.

n rows, O features of the first projection (2I with a gate), I intermediate.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate


class Gate(Protocol):
    """`h = gate(u)`."""

    def forward(self, u_nO: torch.Tensor) -> torch.Tensor:
        """`h [n, I]` in fresh memory."""
        ...

    def again(self, u_nO: torch.Tensor) -> "tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]":
        """`h` once more, and the function that takes `dh` (which it may overwrite) to `du`."""
        ...


class AnyGate:
    """Whatever an architecture computes there, through autograd."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.function = function

    def forward(self, u_nO: torch.Tensor) -> torch.Tensor:
        """`h`."""
        return self.function(u_nO)

    def again(self, u_nO: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """`h` and its backward."""
        with torch.enable_grad():
            leaf_nO = u_nO.detach().requires_grad_()
            h_nI = self.function(leaf_nO)
        return h_nI.detach(), lambda dh_nI: torch.autograd.grad(h_nI, leaf_nO, dh_nI)[0]


class SiluGate:
    """`silu(gate) * up` of the halves of `u`, which most architectures compute: half the passes over memory."""

    def forward(self, u_nO: torch.Tensor) -> torch.Tensor:
        """`h`."""
        gate_nI, up_nI = u_nO.chunk(2, dim=-1)
        return functional.silu(gate_nI).mul_(up_nI)

    def again(self, u_nO: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """`h` and its backward."""
        gate_nI, up_nI = u_nO.chunk(2, dim=-1)
        silu_nI = functional.silu(gate_nI)

        def backward(dh_nI: torch.Tensor) -> torch.Tensor:
            du_nO = torch.empty_like(u_nO)
            dgate_nI, dup_nI = du_nO.chunk(2, dim=-1)
            torch.mul(dh_nI, silu_nI, out=dup_nI)
            torch.ops.aten.silu_backward.grad_input(dh_nI.mul_(up_nI), gate_nI, grad_input=dgate_nI)
            return du_nO

        return silu_nI * up_nI, backward


def gate_of(module: Any) -> Gate:
    """The gate of an experts module of transformers."""
    if not module.has_gate:
        return AnyGate(module.act_fn)
    is_default = getattr(type(module), "_apply_gate", None) is _default_apply_gate
    if is_default and type(module.act_fn) is type(ACT2FN["silu"]):
        return SiluGate()
    return AnyGate(module._apply_gate)
