"""The experts of a layer, registered on transformers' `ExpertsInterface`, through which most architectures dispatch.

T tokens, K experts a token, R = T*K routed rows, E experts, H hidden, I intermediate, r rank.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from finetune.errors import Problem, WeightsError
from finetune.moe.checkpointing import kept_values
from finetune.moe.engine.function import ExpertsCall, run_experts
from finetune.moe.engine.gates import gate_of
from finetune.moe.engine.routed_rows import (
    Chunk,
    ChunkSize,
    ExpertFactors,
    Projection,
    grouped_chunks,
    loop_chunks,
    pieces_of,
)

EXPERTS_IMPLEMENTATION = "moe_finetune"
_GROUPED_ALIGNMENT = 16  # bytes; grouped products refuse rows that do not start at a multiple of it


def experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Output `[T, H]` of the selected experts, weighted and summed.

    `module` holds the frozen stacks `gate_up_proj [E, 2I, H]` (or `up_proj [E, I, H]` without a gate) and
    `down_proj [E, H, I]`, 4-bit or dense, transposed if `is_transposed`, and their biases; `hidden_states [T, H]`,
    `top_k_index` and `top_k_weights [T, K]`. An index of E means "no expert" (expert parallelism). One host sync, none
    where grouped products exist.
    """
    x_TH = _compute_cast(hidden_states)
    grouped = _grouped_products(x_TH) and not module._is_expert_parallel
    kept = kept_values()
    up = _projection(module, "gate_up_proj" if module.has_gate else "up_proj", x_TH.dtype, grouped)
    down = _projection(module, "down_proj", x_TH.dtype, grouped)

    pieces = pieces_of(top_k_index.numel(), up.out_features)

    def sort_rows() -> tuple[torch.Tensor, Sequence[Chunk]]:
        if grouped:
            return grouped_chunks(top_k_index, module.num_experts, pieces)
        return _sort_rows(top_k_index, module.num_experts, ChunkSize.for_columns(up.out_features, x_TH.is_cuda))

    order_R, chunks = sort_rows() if kept is None else kept.once(sort_rows)
    call = ExpertsCall(
        up=up,
        down=down,
        gate=gate_of(module),
        chunks=chunks,
        is_large=pieces > 1,
    )
    with torch.autocast(x_TH.device.type, enabled=False):
        out_TH = run_experts(call, x_TH, top_k_weights.reshape(-1)[order_R])
    return out_TH.to(hidden_states.dtype)


def _compute_cast(hidden_states: torch.Tensor) -> torch.Tensor:
    """The tokens in the compute dtype: autocast's, or their own."""
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type):
        return hidden_states.to(torch.get_autocast_dtype(device_type))
    return hidden_states


def _sort_rows(index_TK: torch.Tensor, num_experts: int, size: ChunkSize) -> tuple[torch.Tensor, Sequence[Chunk]]:
    """The rows (token * K + choice) sorted by expert, in chunks for a loop over experts: a host sync."""
    expert_R, order_R = index_TK.reshape(-1).sort(stable=True)
    past_E = torch.searchsorted(expert_R, torch.arange(num_experts, device=expert_R.device), right=True)
    return order_R, loop_chunks([0, *past_E.tolist()], order_R // index_TK.shape[-1], size)


def _grouped_products(x: torch.Tensor) -> bool:
    """Whether `grouped_mm` has a kernel for this dtype and device; elsewhere it is a loop with host syncs."""
    return x.is_cuda and x.dtype == torch.bfloat16 and _has_grouped_kernel(x.device.index)


@cache
def _has_grouped_kernel(device_index: int) -> bool:
    return torch.cuda.get_device_capability(device_index)[0] in (9, 10)


def _projection(module: Any, name: str, dtype: torch.dtype, grouped: bool) -> Projection:
    factors = [_fitted(factors, module.num_experts, dtype, grouped) for factors in module_factors(module, name)]
    stack, bias = getattr(module, name), getattr(module, f"{name}_bias") if module.has_bias else None
    if torch.is_grad_enabled() and (stack.requires_grad or (bias is not None and bias.requires_grad)):
        what = "would get no gradient: it is not frozen, or has an adapter that `factor_stacks` has not seen"
        do = "freeze it; after PEFT's load_adapter or add_adapter call finetune.moe.lora.factor_stacks(model)"
        raise WeightsError(Problem(f"experts: {name}", what, do))
    return Projection(stack, bias, module.is_transposed, tuple(factors))


def _fitted(factors: ExpertFactors, num_experts: int, dtype: torch.dtype, grouped: bool) -> ExpertFactors:
    """The factors in the computation's dtype; for grouped products with a row for each expert and an aligned rank."""
    A_SrI, B_SrO = factors.A.to(dtype), factors.B.to(dtype)
    fitted = replace(factors, A=A_SrI, B=B_SrO)
    if not grouped:
        return fitted
    missing = -A_SrI.shape[1] % (_GROUPED_ALIGNMENT // dtype.itemsize)
    if missing:
        fitted = replace(fitted, A=pad(A_SrI, (0, 0, 0, missing)), B=pad(B_SrO, (0, 0, 0, missing)))
    return fitted.spread(num_experts)


def module_factors(module: Any, name: str) -> list[ExpertFactors]:
    """The active LoRA factors of stack `name`; `finetune.moe.lora` leaves their source on the module."""
    source = getattr(module, "lora_sources", {}).get(name)
    return [] if source is None else source.active_factors()


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
