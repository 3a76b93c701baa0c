"""Forward and backward of a layer's experts as one autograd function.

For the rows of expert e: `u = x W1_e + b1_e + s (x A1_e^T) B1_e^T`, `h = gate(u)`,
`y = h W2_e + b2_e + s (h A2_e^T) B2_e^T`, and a token's output is the sum of its rows' `y`, weighted by the router.

Saved for the backward: `x`, `u` and the rank-r products; of many rows under full checkpointing `x` alone. Weights are
dequantised again, `h` is recomputed from `u`, and `y` is not needed: the gradient of a row's router weight is
`<g, y> = <W2 g + s A2^T B2^T g, h> + <g, b2>`, all of which the backward computes anyway. Frozen weights get no
gradient.

T tokens, H hidden, R routed rows sorted by expert, n rows of a chunk, E experts, I intermediate, r rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from finetune.moe.checkpointing import kept_values
from finetune.moe.dropout import InputDropout
from finetune.moe.engine.gates import Gate, sum_dtype
from finetune.moe.engine.routed_rows import Chunk, ExpertFactors, Projection, Weights


@dataclass(frozen=True)
class ExpertsCall:
    """The inputs of one call of a layer's experts, except the tensors that get gradients."""

    up: Projection
    down: Projection
    gate: Gate
    chunks: Sequence[Chunk]
    is_large: bool = False  # so many rows that full checkpointing should save nothing of their size

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
    kept = kept_values()
    output: torch.Tensor
    if call.is_large and kept is not None and not kept.keeps_experts:
        graph_TH = _Graph.apply(call, x_TH, weight_R, *tensors)  # type: ignore[no-untyped-call]
        output = _Output.apply(graph_TH, call, x_TH.detach(), weight_R.detach())  # type: ignore[no-untyped-call]
    else:
        output = _Experts.apply(call, x_TH, weight_R, *tensors)  # type: ignore[no-untyped-call]
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
        _save(ctx, call, x_TH, weight_R, *tensors, *saved)
        return out_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _backward(ctx, *grad_outputs)


class _Graph(torch.autograd.Function):
    """The experts in autograd's graph, without their values, which its backward computes again: nothing of the size of
    all rows is saved.

    Its inputs are saved before `_Output` computes. Where nothing later in the layer saves a tensor, checkpointing ends
    its recompute here (torch's early stop), and the experts run only once more.
    """

    @staticmethod
    def forward(
        ctx: Any, call: ExpertsCall, x_TH: torch.Tensor, weight_R: torch.Tensor, *tensors: torch.Tensor
    ) -> torch.Tensor:
        _save(ctx, call, x_TH, weight_R, *tensors)
        return x_TH.new_empty(()).expand(x_TH.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _backward(ctx, *grad_outputs)


class _Output(torch.autograd.Function):
    """The values that belong to `_Graph`."""

    @staticmethod
    def forward(
        _ctx: Any, _graph_TH: torch.Tensor, call: ExpertsCall, x_TH: torch.Tensor, weight_R: torch.Tensor
    ) -> torch.Tensor:
        kept = kept_values()
        assert kept is not None
        with kept.apart():
            return _forward(call, x_TH, weight_R, keep=False)[0]

    @staticmethod
    def backward(_ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *grad_outputs, None, None, None


def _save(ctx: Any, call: ExpertsCall, x_TH: torch.Tensor, *others: torch.Tensor) -> None:
    """`others`: router weights, factors, and what `_forward` saves.

    The factors are saved as tensors, not with the call: they are copies, which checkpointing recomputes, and autograd
    raises an error if they change before the backward.
    """
    ctx.call = call.with_tensors([x_TH.new_empty(0)] * (2 * len(call.factors)))
    ctx.save_for_backward(x_TH, *others)


def _backward(ctx: Any, g_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradients of the function's arguments."""
    x_TH, weight_R, *others = ctx.saved_tensors
    count = 2 * len(ctx.call.factors)
    call: ExpertsCall = ctx.call.with_tensors(others[:count])
    each = 1 + len(call.factors)  # saved tensors of a chunk
    backward = _Backward(call, x_TH, weight_R, g_TH, ctx.needs_input_grad)
    for number, chunk in enumerate(call.chunks):
        first = count + number * each
        backward.add(chunk, others[first : first + each])
    return backward.results()


class _Backward:
    """The sums of all chunks' gradients."""

    def __init__(
        self, call: ExpertsCall, x_TH: torch.Tensor, weight_R: torch.Tensor, g_TH: torch.Tensor, needed: Sequence[bool]
    ) -> None:
        """`needed`: which arguments of the function need a gradient."""
        self.call, self.x_TH, self.weight_R, self.g_TH = call, x_TH, weight_R, g_TH
        cut = len(call.chunks) > 1
        self.up, self.down = (Weights(projection, x_TH.dtype, hold=cut) for projection in (call.up, call.down))
        in_float32 = cut and call.chunks[0].sums_in_float32
        trained = zip(needed[3::2], needed[4::2], strict=True)
        of_both = [_Gradients(factors, each, in_float32) for factors, each in zip(call.factors, trained, strict=True)]
        self.of_up, self.of_down = of_both[: len(call.up.factors)], of_both[len(call.up.factors) :]
        self.grad_weight_R = torch.zeros_like(weight_R)
        self.grad_x_TH = None
        if needed[1]:
            self.grad_x_TH = torch.zeros(x_TH.shape, dtype=sum_dtype(x_TH), device=x_TH.device)

    def results(self) -> tuple[torch.Tensor | None, ...]:
        """In the order of the function's arguments."""
        grad_x = None if self.grad_x_TH is None else self.grad_x_TH.to(self.x_TH.dtype)
        of_factors = (grad for gradients in self.of_up + self.of_down for grad in gradients.results())
        return None, grad_x, self.grad_weight_R, *of_factors

    def add(self, chunk: Chunk, saved: Sequence[torch.Tensor]) -> None:
        """Add a chunk's share; `saved`: what the forward kept of it, or nothing."""
        u_nO, *low_nr = saved or _first_projection(chunk, self.call, chunk.gather(self.x_TH), self.up)
        g_nH = chunk.gather(self.g_TH)
        weight_n = self.weight_R[chunk.rows]
        dh_nI = chunk.project_back(g_nH, self.down)  # not yet times the row's router weight
        backs = [gradients.back(chunk, g_nH, dh_nI) for gradients in self.of_down]
        h_nI, gradient_n, gate_backward = self.call.gate.again(u_nO, dh_nI, weight_n)
        del dh_nI, u_nO
        self.grad_weight_R[chunk.rows] = gradient_n + _bias_products(chunk, self.call.down, g_nH)
        lows = low_nr[len(self.of_up) :] or [
            gradients.low(chunk, h_nI, mask) for gradients, (_, mask) in zip(self.of_down, backs, strict=True)
        ]
        for gradients, low, back in zip(self.of_down, lows, backs, strict=True):
            gradients.add(chunk, g_nH, h_nI, low, back, weight_n[:, None])
        del g_nH, h_nI, backs
        du_nO = gate_backward()
        del gate_backward
        dx_nH = None if self.grad_x_TH is None else chunk.project_back(du_nO, self.up)
        x_nH = chunk.gather(self.x_TH) if self.of_up else du_nO
        for gradients, low in zip(self.of_up, low_nr[: len(self.of_up)], strict=True):
            gradients.add(chunk, du_nO, x_nH, low, gradients.back(chunk, du_nO, dx_nH, x_nH))
        if self.grad_x_TH is not None and dx_nH is not None:
            chunk.scatter_add(self.grad_x_TH, dx_nH)


def _forward(
    call: ExpertsCall, x_TH: torch.Tensor, weight_R: torch.Tensor, keep: bool = True
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output, and, with `keep`, what the backward needs of each chunk: `u`, and `x A^T` of each pair of factors."""
    saved: list[torch.Tensor] = []
    out_TH = torch.zeros(x_TH.shape, dtype=sum_dtype(x_TH), device=x_TH.device)
    up, down = (Weights(projection, x_TH.dtype, hold=len(call.chunks) > 1) for projection in (call.up, call.down))

    def add(chunk: Chunk) -> None:
        u_nO, *low_up = _first_projection(chunk, call, chunk.gather(x_TH), up)
        h_nI = call.gate.forward(u_nO)
        y_nH = chunk.project(h_nI, down)
        low_down = _add_factors(chunk, call.down, y_nH, h_nI)
        chunk.scatter_add(out_TH, y_nH * weight_R[chunk.rows, None])
        saved.extend([u_nO, *low_up, *low_down] if keep else [])

    for chunk in call.chunks:
        add(chunk)
    return out_TH.to(x_TH.dtype), saved


def _first_projection(chunk: Chunk, call: ExpertsCall, x_nH: torch.Tensor, up: Weights) -> list[torch.Tensor]:
    """`u`, and `x A^T` of each pair of factors."""
    u_nO = chunk.project(x_nH, up)
    return [u_nO, *_add_factors(chunk, call.up, u_nO, x_nH)]


_Back = tuple[torch.Tensor, torch.Tensor | None]
"""`g B^T [n, r]` and dropout's mask of a pair of factors."""


class _Gradients:
    """The gradients of one pair of factors, chunk by chunk."""

    def __init__(self, factors: ExpertFactors, trained: tuple[bool, bool], in_float32: bool) -> None:
        """`trained`: whether `A` and `B` need a gradient; `in_float32`: sum up chunks in at least float32."""
        self.factors = factors
        self.sums = tuple(
            torch.zeros_like(factor, dtype=sum_dtype(factor) if in_float32 else None) if needed else None
            for factor, needed in zip((factors.A, factors.B), trained, strict=True)
        )

    def results(self) -> list[torch.Tensor | None]:
        """The gradients of `A` and `B` in the factors' dtype, None where not needed."""
        return [None if total is None else total.to(self.factors.A.dtype) for total in self.sums]

    def low(self, chunk: Chunk, x_nI: torch.Tensor, mask_nI: torch.Tensor | None) -> torch.Tensor:
        """`dropout(x) A^T`, where the forward has not kept it."""
        return chunk.factor_down(x_nI if mask_nI is None else x_nI * mask_nI, self.factors.A, self.factors)

    def back(
        self, chunk: Chunk, g_nO: torch.Tensor, dx_nI: torch.Tensor | None, x_nI: torch.Tensor | None = None
    ) -> _Back:
        """Add a chunk's share to `dx`; returns `g B^T` and dropout's mask. `x_nI` is needed where `dx` is not."""
        factors = self.factors
        like_nI = x_nI if dx_nI is None else dx_nI
        assert like_nI is not None
        mask_nI = _mask(chunk, like_nI, factors.dropout)
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
        factors, (grad_A, grad_B) = self.factors, self.sums
        g_nr, mask_nI = back
        scale = factors.scaling if weight_n1 is None else factors.scaling * weight_n1
        if grad_A is not None:
            chunk.add_outer(grad_A, (g_nr * scale).to(g_nr.dtype), x_nI if mask_nI is None else x_nI * mask_nI, factors)
        if grad_B is not None:
            chunk.add_outer(grad_B, (low_nr * scale).to(g_nO.dtype), g_nO, factors)


def _add_factors(chunk: Chunk, projection: Projection, y_nO: torch.Tensor, x_nI: torch.Tensor) -> list[torch.Tensor]:
    """`y += s (dropout(x) A^T) B^T` for each pair of factors, in place; returns each `dropout(x) A^T`."""
    low_nr = []
    for factors in projection.factors:
        mask_nI = _mask(chunk, x_nI, factors.dropout)
        low_nr.append(chunk.factor_down(x_nI if mask_nI is None else x_nI * mask_nI, factors.A, factors))
        chunk.add_factor_up(y_nO, low_nr[-1], factors.B, factors, factors.scaling)
    return low_nr


def _bias_products(chunk: Chunk, down: Projection, g_nH: torch.Tensor) -> torch.Tensor | float:
    """`<g, b2>` of each row, summed in at least float32: the part of `<g, y>` that `<dh, h>` lacks."""
    if down.bias is None:
        return 0.0
    return (g_nH.to(sum_dtype(g_nH)) * chunk.row_bias(down.bias)).sum(-1)


def _mask(chunk: Chunk, x_nI: torch.Tensor, dropout: InputDropout | None) -> torch.Tensor | None:
    """Dropout's mask, 0 or 1 / (1 - p), of the chunk's rows; the same in the forward and the backward."""
    if dropout is None:
        return None
    keys_n1 = chunk.gather(dropout.keys_T[:, None]) + chunk.row_bias(dropout.expert_keys())
    return dropout.mask(x_nI, keys_n1.squeeze(1))
