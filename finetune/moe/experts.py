"""Expert forward and backward with factored LoRA, registered on transformers' `ExpertsInterface`.

Computes `x W_e^T + s (x A_e^T) B_e^T` for the tokens that expert `e` received. `W_e` is dequantised when needed and
again in the backward: no dequantised weight is saved, and no dense weight gradient is formed.

T tokens, K experts a token, R = T*K routed rows, n rows of one expert, E experts, H hidden, I intermediate, r rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from finetune.moe.nf4 import Nf4Stack

EXPERTS_IMPLEMENTATION = "moe_finetune"


@dataclass(frozen=True)
class ExpertFactors:
    """LoRA factors of one stack: per expert `A [r, in]` and `B [out, r]`, and the scale of `B A`."""

    lora_A: Sequence[torch.Tensor]
    lora_B: Sequence[torch.Tensor]
    scaling: float

    def delta(self, x_nI: torch.Tensor, expert: int) -> torch.Tensor:
        """`s (x A_e^T) B_e^T`, `[n, out]`, computed in the factors' dtype and returned in x's."""
        A_rI, B_Or = self.lora_A[expert], self.lora_B[expert]
        y_nO = functional.linear(functional.linear(x_nI.to(A_rI.dtype), A_rI), B_Or)
        return (self.scaling * y_nO).to(x_nI.dtype)


class _FrozenLinear(torch.autograd.Function):
    """`x W_e^T` with a frozen weight that is fetched again in the backward instead of being saved."""

    @staticmethod
    def forward(ctx: Any, x_nI: torch.Tensor, stack: torch.Tensor, expert: int) -> torch.Tensor:
        ctx.stack, ctx.expert = stack, expert
        return x_nI @ expert_weight(stack, expert).to(x_nI.dtype).T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_nO,) = grad_outputs
        return grad_nO @ expert_weight(ctx.stack, ctx.expert).to(grad_nO.dtype), None, None


def expert_weight(stack: torch.Tensor, expert: int) -> torch.Tensor:
    """Weight `[O, I]` of one expert of a 4-bit or dense stack."""
    data = stack.data if isinstance(stack, torch.nn.Parameter) else stack
    return data.expert(expert) if isinstance(data, Nf4Stack) else data[expert]


def _project(module: Any, name: str, x_nI: torch.Tensor, expert: int, factors: Sequence[ExpertFactors]) -> torch.Tensor:
    y_nO: torch.Tensor = _FrozenLinear.apply(x_nI, getattr(module, name), expert)  # type: ignore[no-untyped-call]
    for factor in factors:
        y_nO = y_nO + factor.delta(x_nI, expert)
    return y_nO


def experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Output `[T, H]` of the selected experts, weighted and summed.

    `module` holds the stacks `gate_up_proj [E, 2I, H]` and `down_proj [E, H, I]` (4-bit or dense, frozen);
    `hidden_states [T, H]`, `top_k_index` and `top_k_weights [T, K]`. An index of E means "no expert".
    """
    up_factors = module_factors(module, "gate_up_proj")
    down_factors = module_factors(module, "down_proj")
    expert_R = top_k_index.reshape(-1)
    order_R = expert_R.argsort(stable=True)
    token_R = order_R // top_k_index.shape[-1]
    x_RH = hidden_states[token_R]
    outputs = []
    for expert, rows in _expert_rows(expert_R, module.num_experts):
        x_nH = x_RH[rows]
        h_nI = module._apply_gate(_project(module, "gate_up_proj", x_nH, expert, up_factors))
        outputs.append(_project(module, "down_proj", h_nI, expert, down_factors))
    y_RH = torch.cat(outputs) if outputs else x_RH[:0]
    used = slice(0, y_RH.shape[0])
    weight_R = top_k_weights.reshape(-1)[order_R]
    y_RH = (y_RH * weight_R[used, None]).to(hidden_states.dtype)
    return torch.zeros_like(hidden_states).index_add(0, token_R[used], y_RH)


def _expert_rows(expert_R: torch.Tensor, num_experts: int) -> Iterator[tuple[int, slice]]:
    """Each expert that received rows, with its slice of the rows sorted by expert. One host sync."""
    counts = torch.bincount(expert_R, minlength=num_experts)[:num_experts]
    bounds = [0, *counts.cumsum(0).tolist()]
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        if stop > start:
            yield expert, slice(start, stop)


def module_factors(module: Any, name: str) -> list[ExpertFactors]:
    """The active LoRA factors of stack `name`; `finetune.moe.lora` leaves their source on the module."""
    source = getattr(module, "lora_sources", {}).get(name)
    return [] if source is None else source.active_factors()


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
