"""Find the tensors of a base checkpoint that an adapter changes: expert stacks, routers and linear layers.

The adapter's settings are matched by PEFT's own rules. The table of families gives the names of published checkpoints;
a checkpoint may also hold a stack as one tensor, as the loaded model does
(`save_pretrained(save_original_format=False)`). The keys decide which of the two it is.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from finetune.adapters.adapter import Adapter
from finetune.adapters.tensors import EMBEDDING, HEAD
from finetune.checkpoint import CheckpointReader
from finetune.cpu_limit import OverLimitError, cpu_limit
from finetune.errors import Problem, WeightsError
from finetune.model_files import build_config, first_line
from finetune.moe.families import ExpertStack, Family, MoeLayout
from finetune.upstream import private

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
    num_layers = int(build_config(base.config, base.folder).num_hidden_layers)
    prefixes = [f"model.layers.{number}." for number in range(num_layers)]
    stacks: tuple[Stack, ...] = ()
    renamed: dict[str, str] = {}
    if family.moe is not None:
        moe = family.moe
        stacks = _stacks(base, moe, [prefix for prefix in prefixes if _is_sparse(base, moe, prefix)])
        router = moe.router_parameter.removesuffix(".weight")
        renamed = {prefix + moe.disk_router: prefix + router for prefix in prefixes}
    in_stacks = {key for stack in stacks for keys in stack.keys for key in keys}
    modules = {
        key: renamed.get(key, key.removesuffix(".weight"))
        for key in base.keys
        if key not in in_stacks
        and key.endswith(".weight")
        and len(base.info(key).shape) == 2
        and _loaded(key, num_layers)
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


ALL_LINEAR = "all-linear"
SECONDS = 2
"""CPU time to match the settings' expressions with all names of a base; usual ones take milliseconds."""
_EXPRESSIONS = ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern")


@dataclass(frozen=True)
class StackOrder:
    """How the factors of a stack of experts lie in their two matrices, where it is not as PEFT 0.21 has it."""

    swapped: bool = False  # `lora_A` [E*r, out] and `lora_B` [in, E*r] instead of [E*r, in] and [out, E*r]
    expert_major: bool = False  # columns of `lora_B` by expert, then rank, instead of by rank, then expert


@dataclass(frozen=True)
class Target:
    """One module or stacked parameter, and the tensors on disk that make it.

    A module of one expert may be rows of a whole stack on disk: `piece` is the first of them and their number.
    """

    name: str  # as PEFT matches patterns
    path: str  # as PEFT names its factors
    part: str
    keys: tuple[tuple[str, ...], ...]  # by tensor along the expert axis, then along the output axis
    experts: int = 1
    transposed: bool = False  # rows on disk are input features
    piece: tuple[int, int] | None = None
    order: StackOrder = StackOrder()
    peft_path: str = ""  # of a stack: as PEFT 0.21 would name its factors

    def features(self, base: CheckpointReader) -> tuple[int, int]:
        """Inputs and outputs of one expert, by its shape on disk."""
        rows = sum(base.info(key).shape[-2] for key in self.keys[0])
        columns = base.info(self.keys[0][0]).shape[-1]
        return (rows, columns) if self.transposed else (columns, rows)


def targets_of(layout: BaseLayout, adapter: Adapter, family: Family) -> Iterator[Target]:
    """Everything that the settings name in this base."""
    if is_unstacked(adapter, family):
        yield from _unstacked(layout, adapter, family)
        return
    transposed = family.moe is not None and family.moe.transposed
    by_module: dict[str, list[Stack]] = {}
    for stack in layout.stacks:
        if _names_parameter(adapter.settings, stack.name):
            by_module.setdefault(stack.module, []).append(stack)
    for module, stacks in by_module.items():
        # PEFT wraps the parameters of one module in their order, each around the one before: the last is outermost.
        for depth, stack in enumerate(reversed(stacks)):
            path = module + ".base_layer" * depth
            yield Target(stack.name, path, "experts", stack.keys, stack.experts, transposed, peft_path=path)
    for key, module in layout.modules.items():
        if _names_parameter(adapter.settings, f"{module}.weight"):
            yield Target(f"{module}.weight", module, family.part(module), ((key,),))
        elif _names_module(adapter, module):
            yield _of_module(module, key, adapter, family.part(module))


def match_all(base: CheckpointReader, adapter: Adapter, targets: Iterable[Target]) -> None:
    """Match every expression of the settings with the names of all modules once, as PEFT will."""
    names = {key.removesuffix(".weight") for key in base.keys}
    while parents := {name.rpartition(".")[0] for name in names} - names - {""}:
        names |= parents
    for name in names:
        _names_module(adapter, name)
    for target in targets:
        adapter.scale(target.name)


@contextmanager
def matching(file: Path) -> Iterator[None]:
    """Raise WeightsError where an expression in the settings cannot be read, or takes for ever to match a name."""
    do = "write names of modules there, or an expression without repetitions within each other"
    where = f"{file}: {', '.join(_EXPRESSIONS)}"
    try:
        with cpu_limit(SECONDS):
            yield
    except OverLimitError as error:
        what = f"one of these expressions was not matched with the base's modules within {SECONDS} s"
        raise WeightsError(Problem(where, what, do)) from error
    except (re.error, RecursionError, OverflowError, TypeError) as error:
        raise WeightsError(Problem(where, "cannot be matched with names of modules", do, first_line(error))) from error


def is_unstacked(adapter: Adapter, family: Family) -> bool:
    """Whether the factors are those of a model of transformers 4: a module for each expert, the router one of them.

    Since transformers 5 both are parameters, which only `target_parameters` can name.
    """
    moe = family.moe
    if moe is None or adapter.settings.get("target_parameters"):
        return False
    expert = re.escape(moe.disk_expert.removesuffix(".weight"))
    expert = expert.replace(r"\{expert\}", r"\d+").replace(r"\{name\}", r"\w+")
    router = re.escape(moe.disk_router.removesuffix(".weight"))
    pattern = re.compile(f"{LAYER.pattern}({expert if moe.per_expert else router}|{router})")
    return any(pattern.fullmatch(path) for path in adapter.pairs)


def _unstacked(layout: BaseLayout, adapter: Adapter, family: Family) -> Iterator[Target]:
    """The modules of transformers 4, whose names are those on disk."""
    for stack in layout.stacks:
        for expert, names in enumerate(stack.modules):
            for number, name in enumerate(names):
                if _names_module(adapter, name):
                    yield _of_one_expert(stack, expert, number)
    for key, module in layout.modules.items():
        name = old_name(module, family)
        if _names_module(adapter, name):
            yield _of_module(name, key, adapter, family.part(module))


def old_name(module: str, family: Family) -> str:
    """What transformers 4 called a module that is no expert: as now, but for some routers."""
    layer = LAYER.match(module)
    moe = family.moe
    if layer and moe is not None and module == layer[0] + moe.router_parameter.removesuffix(".weight"):
        return layer[0] + moe.disk_router.removesuffix(".weight")
    return module


def _of_one_expert(stack: Stack, expert: int, number: int) -> Target:
    name = stack.modules[expert][number]
    if len(stack.keys) == stack.experts:
        return Target(name, name, "experts", ((stack.keys[expert][number],),))
    rows = stack.rows // len(stack.modules[expert])
    first = expert * stack.rows + number * rows
    return Target(name, name, "experts", stack.keys, piece=(first, rows))


def _of_module(name: str, key: str, adapter: Adapter, part: str) -> Target:
    pair = adapter.pairs.get(name)
    part = "vocabulary" if key in (EMBEDDING, HEAD) else part
    return Target(name, name, part, ((key,),), transposed=pair is not None and pair.embedding)


def _names_parameter(settings: dict[str, Any], name: str) -> bool:
    targets = settings.get("target_parameters") or ()
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _names_module(adapter: Adapter, name: str) -> bool:
    check_target_module_exists = private("peft.tuners.tuners_utils:check_target_module_exists")

    targets = adapter.settings.get("target_modules") or []
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        # PEFT looks at each module's class; here the factors say which were linear.
        return name in adapter.pairs and f"{name}.weight" not in (EMBEDDING, HEAD)
    if adapter.settings.get("ensure_weight_tying") and f"{name}.weight" == HEAD and name in adapter.pairs:
        return True  # PEFT adapts the head with the embedding, and leaves it out of the settings
    return bool(check_target_module_exists(SimpleNamespace(**{**adapter.settings, "target_modules": targets}), name))
