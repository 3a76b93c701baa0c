"""Where each architecture keeps its attention, experts and router, in the loaded model and on disk: one table.

`model` names are module path suffixes below `model.layers.N.` as transformers 5 builds them; `disk` names are the
published checkpoint's. Source: transformers' `conversion_mapping.py`.
"""

from dataclasses import dataclass
from typing import Literal

from finetune.errors import Problem, WeightsError


@dataclass(frozen=True)
class ExpertStack:
    """One stacked expert parameter `[E, out, in]` and the on-disk tensors that make it.

    Per-expert checkpoints: `disk_names` are matrices, concatenated along the output axis in this order: Mixtral's
    `gate_up_proj` is `w1` over `w3`. Fused checkpoints: one 3-D tensor that holds the stack as the model does.
    """

    parameter: str
    disk_names: tuple[str, ...]


@dataclass(frozen=True)
class MoeLayout:
    """Names below one decoder layer (`model.layers.N.`) of the parts a dense model does not have."""

    experts_module: str
    router_module: str
    stacks: tuple[ExpertStack, ...]
    disk_expert: str  # format string with {name} and, in a per-expert checkpoint, {expert}
    disk_router: str
    shared: tuple[str, ...] = ()  # linear modules of the experts that see every token: mlp.shared_expert.gate_proj
    transposed: bool = False  # stacks are [E, in, out], in memory and on disk
    scores: Literal["softmax", "sigmoid"] = "softmax"  # what the router makes of its logits
    correction_bias: str | None = None  # tensor [E] added to the scores for the choice only (DeepSeek-V3)


@dataclass(frozen=True)
class Family:
    """One architecture (`config.model_type`)."""

    model_type: str
    attention: tuple[str, ...]
    dense_mlp: tuple[str, ...]
    moe: MoeLayout | None


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("mistral", _ATTENTION, ("gate_proj", "up_proj", "down_proj"), None),
        Family("llama", _ATTENTION, ("gate_proj", "up_proj", "down_proj"), None),
        Family(
            "mixtral",
            _ATTENTION,
            (),
            MoeLayout(
                experts_module="mlp.experts",
                router_module="mlp.gate",
                stacks=(ExpertStack("gate_up_proj", ("w1", "w3")), ExpertStack("down_proj", ("w2",))),
                disk_expert="block_sparse_moe.experts.{expert}.{name}.weight",
                disk_router="block_sparse_moe.gate.weight",
            ),
        ),
    )
}


def family_of(model_type: str, where: str) -> Family:
    """The family of `config.model_type`; `where` (a path) goes into the error for an unsupported one."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise WeightsError(Problem(where, "architecture is not supported", f"use one of: {known}", got=model_type))
    return FAMILIES[model_type]
