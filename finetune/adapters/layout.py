"""Where a base checkpoint keeps what an adapter can change: its stacks of experts, its routers, its linear layers.

The table of families says how the published checkpoints name things; a checkpoint may as well hold a stack as the
loaded model does (`save_pretrained(save_original_format=False)`). Which of the two, is read from the keys.
"""

import re
from dataclasses import dataclass

from finetune.checkpoint import CheckpointReader
from finetune.moe.families import ExpertStack, Family, MoeLayout

LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Stack:
    """The tensors on disk that are one stacked parameter of the loaded model."""

    module: str
    parameter: str
    keys: tuple[tuple[str, ...], ...]  # by tensor along the expert axis, then along the output axis
    experts: int
    rows: int  # of one expert on disk, over the tensors along its output axis
    modules: tuple[tuple[str, ...], ...] = ()  # as transformers 4 called them, by expert; empty where it had stacks too

    @property
    def name(self) -> str:
        """As PEFT matches targets and patterns."""
        return f"{self.module}.{self.parameter}"


@dataclass(frozen=True)
class BaseLayout:
    """Stacks in the order in which their module holds them, and the modules of all other matrices by key."""

    stacks: tuple[Stack, ...]
    modules: dict[str, str]


def base_layout(base: CheckpointReader, family: Family) -> BaseLayout:
    """Look at the keys of a base that is complete.

    Only layers that the architecture loads count: a published checkpoint may have more (multi-token prediction).
    """
    num_layers = int(base.config["num_hidden_layers"])
    prefixes = [f"model.layers.{number}." for number in range(num_layers)]
    stacks: tuple[Stack, ...] = ()
    renamed: dict[str, str] = {}
    if family.moe is not None:
        moe = family.moe
        stacks = _stacks(base, moe, [prefix for prefix in prefixes if _is_sparse(base, moe, prefix)])
        router = moe.router_parameter.removesuffix(".weight")
        renamed = {prefix + moe.disk_router: prefix + router for prefix in prefixes}
    taken = {key for stack in stacks for keys in stack.keys for key in keys}
    modules = {
        key: renamed.get(key, key.removesuffix(".weight"))
        for key in base.keys
        if key not in taken and key.endswith(".weight") and len(base.info(key).shape) == 2 and _loaded(key, num_layers)
    }
    return BaseLayout(stacks, modules)


def _loaded(key: str, num_layers: int) -> bool:
    match = LAYER.match(key)
    return match is None or int(match[1]) < num_layers


def _is_sparse(base: CheckpointReader, moe: MoeLayout, prefix: str) -> bool:
    """A layer with a router is one with experts."""
    return any(base.holds(prefix + key) for key in (moe.disk_router, moe.router_parameter))


def _stacks(base: CheckpointReader, moe: MoeLayout, prefixes: list[str]) -> tuple[Stack, ...]:
    count = _count_experts(base, moe)
    return tuple(_stack(base, moe, prefix, number, count) for prefix in prefixes for number in range(len(moe.stacks)))


def _count_experts(base: CheckpointReader, moe: MoeLayout) -> int:
    """Experts of a per-expert checkpoint; 1 of any other."""
    pattern = LAYER.pattern + re.escape(moe.disk_expert).replace(r"\{expert\}", r"(\d+)").replace(r"\{name\}", r"\w+")
    matches = (re.fullmatch(pattern, key) for key in base.keys) if moe.per_expert else ()
    return max((int(match[2]) + 1 for match in matches if match), default=1)


def _stack(base: CheckpointReader, moe: MoeLayout, prefix: str, number: int, count: int) -> Stack:
    module, stack = prefix + moe.experts_module, moe.stacks[number]
    as_loaded = f"{module}.{stack.parameter}"
    if base.holds(as_loaded):
        keys: tuple[tuple[str, ...], ...] = ((as_loaded,),)
    else:
        tensors = range(count) if moe.per_expert else (None,)
        keys = tuple(
            tuple(prefix + moe.disk_expert.format(expert=expert, name=name) for name in stack.disk_names)
            for expert in tensors
        )
    first = base.info(keys[0][0]).shape
    experts = first[0] if len(first) == 3 else len(keys)
    rows = sum(base.info(key).shape[-2] for key in keys[0])
    return Stack(module, stack.parameter, keys, experts, rows, _modules(moe, stack, prefix, experts))


def _modules(moe: MoeLayout, stack: ExpertStack, prefix: str, experts: int) -> tuple[tuple[str, ...], ...]:
    """A published checkpoint with a tensor for each expert has the names that transformers 4 gave to their modules."""
    if not moe.per_expert:
        return ()
    name = prefix + moe.disk_expert.removesuffix(".weight")
    return tuple(tuple(name.format(expert=e, name=matrix) for matrix in stack.disk_names) for e in range(experts))
