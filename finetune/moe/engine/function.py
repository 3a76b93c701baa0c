"""Forward and backward of a layer's experts as one autograd function.

For the rows of expert e: `u = x W1_e + b1_e + s (x A1_e^T) B1_e^T`, `h = gate(u)`,
`y = h W2_e + b2_e + s (h A2_e^T) B2_e^T`, and a token's output is the sum of its rows' `y`, weighted by the router.

Saved for the backward: `x`, `u` and the rank-r products. Weights are dequantised again, `h` is recomputed from `u`, and
`y` is not needed: the gradient of a row's router weight is `<g, y> = <W2 g + s A2^T B2^T g, h> + <g, b2>`,
all of which the backward computes anyway. Frozen weights get no gradient.

T tokens, H hidden, R routed rows sorted by expert, n rows of a chunk, E experts, I intermediate, r rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from finetune.moe.checkpointing import kept_values
from finetune.moe.engine.gates import Gate, sum_dtype
from finetune.moe.engine.routed_rows import Chunk, ExpertFactors, Projection, Weights


@dataclass(frozen=True)
class ExpertsCall:
    """The inputs of one call of a layer's experts, except the tensors that get gradients."""

    up: Projection
    down: Projection
    gate: Gate
    chunks: Sequence[Chunk]
    seed: int  # for the dropout masks, which the backward generates again

    @property
    def factors(self) -> tuple[ExpertFactors, ...]:
        """Of both projections, in the order of the function's tensor arguments."""
        return self.up.factors + self.down.factors

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> "ExpertsCall":
        """The same call with these factors, `A` and `B` in turn."""
        factors = tuple(
            replace(pair, A=A, B=B) for pair, A, B in zip(self.factors, tensors[::2], tensors[1::2], strict=True)
        )
        count = len(self.up.factors)
        up, down = replace(self.up, factors=factors[:count]), replace(self.down, factors=factors[count:])
        return replace(self, up=up, down=down)


def run_experts(call: ExpertsCall, x_TH: torch.Tensor, weight_R: torch.Tensor) -> torch.Tensor:
    """Output `[T, H]` of the chosen experts; `weight_R`: router weight of each row."""
    tensors = [tensor for factors in call.factors for tensor in (factors.A, factors.B)]
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_TH, weight_R, *tensors))):
        return _forward(call, x_TH, weight_R, keep=False)[0]
    output: torch.Tensor = _Experts.apply(call, x_TH, weight_R, *tensors)  # type: ignore[no-untyped-call]
    return output


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: ExpertsCall, x_TH: torch.Tensor, weight_R: torch.Tensor, *tensors: torch.Tensor
    ) -> torch.Tensor:
        kept = kept_values()
        if kept is None:
            out_TH, saved = _forward(call, x_TH, weight_R)
        else:
            with kept.apart():
                run = partial(_forward, call, x_TH, weight_R)
                out_TH, saved = kept.once(run) if kept.keeps_experts else run()
        # The factors are saved as tensors, not with the call: they are copies, which checkpointing recomputes, and
        # autograd raises an error if they change before the backward.
        ctx.call = call.with_tensors([x_TH.new_empty(0)] * len(tensors))
        ctx.save_for_backward(x_TH, weight_R, *tensors, *saved)
        return out_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g_TH,) = grad_outputs
        x_TH, weight_R, *others = ctx.saved_tensors
        count = 2 * len(ctx.call.factors)
        call: ExpertsCall = ctx.call.with_tensors(others[:count])
        saved = others[count:]
        trained = zip(ctx.needs_input_grad[3::2], ctx.needs_input_grad[4::2], strict=True)
        of_both = [_Gradients(factors, needed) for factors, needed in zip(call.factors, trained, strict=True)]
        of_up, of_down = of_both[: len(call.up.factors)], of_both[len(call.up.factors) :]
        grad_x_TH = None
        if ctx.needs_input_grad[1]:
            grad_x_TH = torch.zeros(x_TH.shape, dtype=sum_dtype(x_TH), device=x_TH.device)
        grad_weight_R = torch.zeros_like(weight_R)
        up, down = Weights(call.up, x_TH.dtype), Weights(call.down, x_TH.dtype)
        for number, chunk in enumerate(call.chunks):
            seed = call.seed + 2 * number
            u_nO, *low_nr = saved[number * (1 + len(of_both)) : (number + 1) * (1 + len(of_both))]
            g_nH = chunk.gather(g_TH)
            dh_nI = chunk.project_back(g_nH, down)  # not yet times the row's router weight
            backs = [gradients.back(chunk, g_nH, dh_nI, seed + 1) for gradients in of_down]
            h_nI, gradient_n, gate_backward = call.gate.again(u_nO, dh_nI, weight_R[chunk.rows])
            del dh_nI
            grad_weight_R[chunk.rows] = gradient_n + _bias_products(chunk, call.down, g_nH)
            for gradients, low, back in zip(of_down, low_nr[len(of_up) :], backs, strict=True):
                gradients.add(chunk, g_nH, h_nI, low, back, weight_R[chunk.rows, None])
            del g_nH, h_nI, backs
            du_nO = gate_backward()
            del gate_backward
            dx_nH = None if grad_x_TH is None else chunk.project_back(du_nO, up)
            x_nH = chunk.gather(x_TH) if of_up else du_nO
            for gradients, low in zip(of_up, low_nr[: len(of_up)], strict=True):
                gradients.add(chunk, du_nO, x_nH, low, gradients.back(chunk, du_nO, dx_nH, seed, x_nH))
            if grad_x_TH is not None and dx_nH is not None:
                chunk.scatter_add(grad_x_TH, dx_nH)
        grad_x = None if grad_x_TH is None else grad_x_TH.to(x_TH.dtype)
        return (None, grad_x, grad_weight_R, *(grad for gradients in of_both for grad in gradients.results))


def _forward(
    call: ExpertsCall, x_TH: torch.Tensor, weight_R: torch.Tensor, keep: bool = True
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output, and, with `keep`, what the backward needs of each chunk: `u`, and `x A^T` of each pair of factors."""
    saved: list[torch.Tensor] = []
    out_TH = torch.zeros(x_TH.shape, dtype=sum_dtype(x_TH), device=x_TH.device)
    up, down = Weights(call.up, x_TH.dtype), Weights(call.down, x_TH.dtype)
    for number, chunk in enumerate(call.chunks):
        x_nH = chunk.gather(x_TH)
        u_nO = chunk.project(x_nH, up)
        low_up = _add_factors(chunk, call.up, u_nO, x_nH, call.seed + 2 * number)
        h_nI = call.gate.forward(u_nO)
        y_nH = chunk.project(h_nI, down)
        low_down = _add_factors(chunk, call.down, y_nH, h_nI, call.seed + 2 * number + 1)
        chunk.scatter_add(out_TH, y_nH * weight_R[chunk.rows, None])
        saved += [u_nO, *low_up, *low_down] if keep else []
    return out_TH.to(x_TH.dtype), saved


_Back = tuple[torch.Tensor, torch.Tensor | None]
"""`g B^T [n, r]` and dropout's mask of a pair of factors."""


class _Gradients:
    """The gradients of one pair of factors, chunk by chunk."""

    def __init__(self, factors: ExpertFactors, trained: tuple[bool, bool]) -> None:
        """`trained`: whether `A` and `B` need a gradient."""
        self.factors = factors
        self.results = tuple(
            torch.zeros_like(factor) if needed else None
            for factor, needed in zip((factors.A, factors.B), trained, strict=True)
        )

    def back(
        self, chunk: Chunk, g_nO: torch.Tensor, dx_nI: torch.Tensor | None, seed: int, x_nI: torch.Tensor | None = None
    ) -> _Back:
        """Add a chunk's share to `dx`; returns `g B^T` and dropout's mask. `x_nI` is needed where `dx` is not."""
        factors = self.factors
        like_nI = x_nI if dx_nI is None else dx_nI
        assert like_nI is not None
        mask_nI = _mask(like_nI, factors.dropout, seed)
        g_nr = chunk.factor_down(g_nO, factors.B, factors)
        if dx_nI is not None and mask_nI is None:
            chunk.add_factor_up(dx_nI, g_nr, factors.A, factors, factors.scaling)
        elif dx_nI is not None and mask_nI is not None:
            part_nI = torch.zeros_like(dx_nI)
            chunk.add_factor_up(part_nI, g_nr, factors.A, factors, factors.scaling)
            dx_nI.addcmul_(part_nI, mask_nI)
        return g_nr, mask_nI

    def add(
        self,
        chunk: Chunk,
        g_nO: torch.Tensor,
        x_nI: torch.Tensor,
        low_nr: torch.Tensor,
        back: _Back,
        weight_n1: torch.Tensor | None = None,
    ) -> None:
        """Add a chunk's share to the factors' gradients.

        `low_nr`: `x A^T`, from the forward; `weight_n1`: what `g` is still to be scaled by.
        """
        factors, (grad_A, grad_B) = self.factors, self.results
        g_nr, mask_nI = back
        scale = factors.scaling if weight_n1 is None else factors.scaling * weight_n1
        if grad_A is not None:
            chunk.add_outer(grad_A, (g_nr * scale).to(g_nr.dtype), x_nI if mask_nI is None else x_nI * mask_nI, factors)
        if grad_B is not None:
            chunk.add_outer(grad_B, (low_nr * scale).to(g_nO.dtype), g_nO, factors)


def _add_factors(
    chunk: Chunk, projection: Projection, y_nO: torch.Tensor, x_nI: torch.Tensor, seed: int
) -> list[torch.Tensor]:
    """`y += s (dropout(x) A^T) B^T` for each pair of factors, in place; returns each `dropout(x) A^T`."""
    low_nr = []
    for factors in projection.factors:
        mask_nI = _mask(x_nI, factors.dropout, seed)
        low_nr.append(chunk.factor_down(x_nI if mask_nI is None else x_nI * mask_nI, factors.A, factors))
        chunk.add_factor_up(y_nO, low_nr[-1], factors.B, factors, factors.scaling)
    return low_nr


def _bias_products(chunk: Chunk, down: Projection, g_nH: torch.Tensor) -> torch.Tensor | float:
    """`<g, b2>` of each row, summed in at least float32: the part of `<g, y>` that `<dh, h>` lacks."""
    if down.bias is None:
        return 0.0
    return (g_nH.to(sum_dtype(g_nH)) * chunk.row_bias(down.bias)).sum(-1)


def _mask(x_nI: torch.Tensor, probability: float, seed: int) -> torch.Tensor | None:
    """Dropout's mask, 0 or 1 / (1 - p); the same for the same seed."""
    if not probability:
        return None
    generator = torch.Generator(x_nI.device).manual_seed(seed)
    return torch.empty_like(x_nI).bernoulli_(1 - probability, generator=generator).div_(1 - probability)
