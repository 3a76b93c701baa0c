"""Which rows of which adapter factors change which tensor on disk, and the change itself.

E experts, r LoRA rank, n a block of rows. PEFT keeps one pair of factors for all experts of a stack: `lora_A [E*r, in]`
is expert-major, `lora_B [out, E*r]` is rank-major (`peft.tuners.lora.layer.ParamWrapper.get_delta_weight`). On disk a
stack is E times one or more matrices (Mixtral's `gate_up_proj` is `w1` over `w3`); each takes its own rows of `lora_B`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from finetune.checkpoint import CheckpointReader
from finetune.checkpoint.reader import read_tensor
from finetune.errors import Problem, WeightsError
from finetune.merge.adapter import PREFIX, WEIGHTS_FILE, Adapter, FactorPair
from finetune.moe.families import Family, MoeLayout

LAYER = re.compile(r"model\.layers\.\d+\.")


@dataclass(frozen=True)
class Delta:
    """The change of one on-disk tensor: `scale * B_e @ A_e`, with the rows of `B_e` from `first_row` on."""

    key: str
    part: str  # attention, experts, router, mlp or other
    path: str
    pair: FactorPair
    scale: float
    experts: int
    expert: int
    first_row: int
    shape: tuple[int, int]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` of the change, fp32 [n, in]; reads only the factors' rows that are needed."""
        r = self.pair.a.shape[0] // self.experts
        A_rI = read_tensor(self.pair.a, self.expert * r, (self.expert + 1) * r).float()
        B_nR = read_tensor(self.pair.b, self.first_row + start, self.first_row + stop).float()
        return (expert_columns(B_nR, self.experts, self.expert) @ A_rI).mul_(self.scale)


def expert_columns(B_nR: torch.Tensor, experts: int, expert: int) -> torch.Tensor:
    """The columns [n, r] of one expert in rank-major rows of `lora_B` [n, r*E]."""
    return B_nR.reshape(B_nR.shape[0], -1, experts)[:, :, expert]


@dataclass(frozen=True)
class _Target:
    """One module or stacked parameter that the adapter's settings name, and the matrices on disk that make it."""

    name: str  # as PEFT matches patterns
    path: str  # as PEFT names its factors
    part: str
    disk_keys: tuple[tuple[str, ...], ...]  # by expert, then along the output axis


def plan(base: CheckpointReader, adapter: Adapter, family: Family) -> dict[str, Delta]:
    """Every on-disk tensor that the adapter changes.

    Raises WeightsError (all problems at once) for factors that match nothing in the base, for targets without factors,
    and for shapes or ranks that do not fit.
    """
    targets = list(_targets(base, adapter, family))
    where = str(adapter.folder / WEIGHTS_FILE)
    unused = sorted(set(adapter.pairs) - {target.path for target in targets})
    problems = [
        Problem(where, "tensor matches nothing in the base", "merge into the base it was trained on", f"{PREFIX}{path}")
        for path in unused
    ]
    deltas: dict[str, Delta] = {}
    for target in targets:
        if target.path not in adapter.pairs:
            do = "the adapter is incomplete: save it again"
            problems.append(Problem(where, f"has no factors for {target.name}, which its settings name", do))
            continue
        found = _deltas(base, adapter, target)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            deltas |= {delta.key: delta for delta in found}
    if problems:
        raise WeightsError(problems)
    return deltas


def _deltas(base: CheckpointReader, adapter: Adapter, target: _Target) -> list[Delta] | Problem:
    pair, r, experts = adapter.pairs[target.path], adapter.rank(target.name), len(target.disk_keys)
    shapes = [base.info(key).shape for key in target.disk_keys[0]]
    columns = shapes[0][1]
    expected = ((experts * r, columns), (sum(shape[0] for shape in shapes), experts * r))
    if (pair.a.shape, pair.b.shape) != expected:
        where = f"{adapter.folder / WEIGHTS_FILE}: {PREFIX}{target.path}"
        do = f"A {list(expected[0])} and B {list(expected[1])} fit r={r} and the base"
        return Problem(
            where, "shape or rank does not fit", do, got=f"A {list(pair.a.shape)} and B {list(pair.b.shape)}"
        )
    deltas = []
    for expert, keys in enumerate(target.disk_keys):
        first_row = 0
        for key, shape in zip(keys, shapes, strict=True):
            delta = Delta(
                key=key,
                part=target.part,
                path=target.path,
                pair=pair,
                scale=adapter.scale(target.name),
                experts=experts,
                expert=expert,
                first_row=first_row,
                shape=(shape[0], columns),
            )
            deltas.append(delta)
            first_row += shape[0]
    return deltas


def _targets(base: CheckpointReader, adapter: Adapter, family: Family) -> Iterator[_Target]:
    """What the adapter's settings name in this base, by PEFT's own matching rules."""
    layers = sorted({match.group() for key in base.keys if (match := LAYER.match(key))})
    in_stacks: set[str] = set()
    renamed: dict[str, str] = {}
    if family.moe is not None:
        for layer in layers:
            yield from _stack_targets(base, adapter, family.moe, layer, in_stacks)
            renamed[layer + family.moe.disk_router] = layer + family.moe.router_module
    for key in base.keys:
        if key in in_stacks or not key.endswith(".weight") or len(base.info(key).shape) != 2:
            continue
        module = renamed.get(key, key.removesuffix(".weight"))
        if _names_parameter(adapter.settings, f"{module}.weight"):
            yield _Target(f"{module}.weight", module, _part(family, module), ((key,),))
        elif _names_module(adapter.settings, module):
            yield _Target(module, module, _part(family, module), ((key,),))


def _stack_targets(
    base: CheckpointReader, adapter: Adapter, moe: MoeLayout, layer: str, in_stacks: set[str]
) -> Iterator[_Target]:
    held = set(base.keys)
    named: list[tuple[str, tuple[tuple[str, ...], ...]]] = []
    for stack in moe.stacks:
        disk_keys: list[tuple[str, ...]] = []
        while True:
            keys = tuple(layer + moe.disk_expert.format(expert=len(disk_keys), name=name) for name in stack.disk_names)
            if not held.issuperset(keys):
                break
            disk_keys.append(keys)
            in_stacks.update(keys)
        name = f"{layer}{moe.experts_module}.{stack.parameter}"
        if disk_keys and _names_parameter(adapter.settings, name):
            named.append((name, tuple(disk_keys)))
    # PEFT wraps the parameters of one module in their order, each around the one before: the last is outermost.
    for depth, (name, expert_keys) in enumerate(reversed(named)):
        yield _Target(name, f"{layer}{moe.experts_module}" + ".base_layer" * depth, "experts", expert_keys)


def _names_parameter(settings: dict[str, Any], name: str) -> bool:
    targets = settings.get("target_parameters") or ()
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _names_module(settings: dict[str, Any], name: str) -> bool:
    from peft.tuners.tuners_utils import check_target_module_exists

    config = SimpleNamespace(**{**settings, "target_modules": settings.get("target_modules") or []})
    return bool(check_target_module_exists(config, name))


def _part(family: Family, module: str) -> str:
    last = module.rpartition(".")[2]
    if family.moe is not None and module.endswith(family.moe.router_module):
        return "router"
    if last in family.attention:
        return "attention"
    return "mlp" if last in family.dense_mlp else "other"
