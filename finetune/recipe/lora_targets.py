"""Names that `lora.targets` accepts, and what to write for common others."""

import re
from collections.abc import Iterable, Sequence

from finetune.recipe.error_messages import closest

FRIENDLY_TARGETS = ("attention", "experts", "router", "mlp", "shared_experts")

# Only in Mixture-of-Experts models.
MOE_TARGETS = ("experts", "router", "shared_experts")

_EXPERTS = "it lies inside the stacked experts; write experts"
_ALL = (
    "it would also train the router and leave out the stacked experts; name the modules, such as [attention, experts]"
)
_WRONG = {
    **dict.fromkeys(("all-linear", "all_linear", "all"), _ALL),
    **dict.fromkeys(("w1", "w2", "w3", "gate_up_proj", "expert", "moe", "block_sparse_moe"), _EXPERTS),
    **dict.fromkeys(("attn", "self_attn", "self_attention", "attentions", "qkv"), "write attention"),
    **dict.fromkeys(("gate", "routers", "gating", "router_weights"), "it is the router; write router"),
    **dict.fromkeys(("ffn", "feed_forward", "feedforward"), "write mlp (dense layers) or experts"),
    **dict.fromkeys(("shared_expert", "shared_mlp", "shared"), "write shared_experts"),
    **dict.fromkeys(("norm", "input_layernorm", "post_attention_layernorm"), "norms take no adapter; remove it"),
    **{name: f"write {name}_proj, or attention for all four" for name in ("q", "k", "v", "o")},
}
_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")

# Modules after the last router.
_DOWNSTREAM_OF_ALL_ROUTERS = ("lm_head",)


def wrong_target(name: str) -> str | None:
    """What to write in place of a wrong target name; None if it may be right (the model decides)."""
    leaf = name.rpartition(".")[2]
    if name in _WRONG or leaf in _WRONG:
        return _WRONG.get(name, _WRONG.get(leaf))
    if "experts" in name.split(".")[:-1]:
        return _EXPERTS
    if not _MODULE.fullmatch(name):
        return f"write module names without patterns, or one of {', '.join(FRIENDLY_TARGETS)}"
    if name in FRIENDLY_TARGETS or "." in name or "_" in name:
        return None
    close = closest(name.lower(), FRIENDLY_TARGETS)
    return f"did you mean {close}?" if close else None


def reaches_a_router(targets: Iterable[str]) -> bool:
    """True if training `targets` can change the input or the weights of a router.

    Attention comes before the router of its layer, the experts of a layer before the router of the next. Whether an
    explicit module name lies after the last router depends on the model.
    """
    return any(name.rpartition(".")[2] not in _DOWNSTREAM_OF_ALL_ROUTERS for name in targets)


def only_in_mixtures(targets: Sequence[str]) -> list[str]:
    """The `targets` that only Mixture-of-Experts models have."""
    return [name for name in targets if name in MOE_TARGETS]
