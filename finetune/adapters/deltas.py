"""Which rows of which adapters' factors change which tensor on disk, and the change itself.

E experts, O output and I input features, r LoRA rank, n a block of rows. On disk a stack of experts is E times one or
more matrices (Mixtral's `gate_up_proj` is `w1` over `w3`; each takes its own rows of `lora_B`), or one tensor
[E, O, I], or [E, I, O] where the architecture multiplies from the right.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from finetune.adapters.adapter import PREFIX, WEIGHTS_FILE, Adapter, FactorPair
from finetune.adapters.factors import FactorReader
from finetune.adapters.layout import BaseLayout, Stack, base_layout
from finetune.checkpoint import CheckpointReader
from finetune.errors import Problem, WeightsError
from finetune.moe.families import Family


@dataclass(frozen=True)
class Delta:
    """The change of one tensor on disk by one adapter: `scale * B_e @ A_e` for each expert that it holds."""

    key: str
    part: str  # as `Family.part` names it
    owner: int  # which of the merge's adapters
    path: str
    pair: FactorPair
    scale: float  # the adapter's own times its weight in the merge
    experts: int  # of the factors
    expert: int  # the first one in this tensor
    first_row: int  # of the factors' output features
    shape: tuple[int, int]  # of one expert on disk
    transposed: bool = False  # on disk [I, O]

    @property
    def extent(self) -> int:
        """How many rows of one expert all tensors of this delta's path must take together."""
        return self.pair.a.shape[1] if self.transposed else self.pair.b.shape[0]

    def place(self, start: int) -> tuple[int, int]:
        """The expert that row `start` of the tensor on disk belongs to, and which row of the expert's it is."""
        expert, row = divmod(start, self.shape[0])
        return self.expert + expert, self.first_row + row

    def factors(self, start: int, factors: FactorReader) -> tuple[torch.Tensor, torch.Tensor]:
        """The change of the expert that row `start` on disk belongs to: left [rows on disk, r], scaled, and right.

        Their product are all rows of this expert in this tensor, fp32; right is [r, I], or [r, O] where transposed.
        """
        expert, _ = self.place(start)
        A_rI = factors.a(self.pair, self.experts, expert)
        first, past = self.first_row, self.first_row + self.shape[0]
        if self.transposed:
            B_Or = factors.b(self.pair, self.experts, expert, 0, self.pair.b.shape[0])
            return A_rI[:, first:past].T * self.scale, B_Or.T
        return factors.b(self.pair, self.experts, expert, first, past) * self.scale, A_rI


@dataclass(frozen=True)
class Change:
    """Everything that is added to one tensor on disk: the deltas of one or more adapters."""

    key: str
    part: str
    deltas: tuple[Delta, ...]

    @property
    def step(self) -> int:
        """A block of rows within a multiple of this is of one expert."""
        return min(delta.shape[0] for delta in self.deltas)

    def factors(self, start: int, factors: FactorReader) -> tuple[torch.Tensor, torch.Tensor]:
        """Left [step, R] and right [R, columns], fp32, of the expert that row `start` belongs to: all deltas.

        R is the sum of the ranks: a sum of products is one product.
        """
        pairs = [delta.factors(start, factors) for delta in self.deltas]
        if len(pairs) == 1:
            return pairs[0]
        return torch.cat([left for left, _ in pairs], dim=1), torch.cat([right for _, right in pairs])


def together(plans: Iterable[Mapping[str, Delta]]) -> dict[str, Change]:
    """The plans of several adapters as one."""
    found: dict[str, list[Delta]] = {}
    for each in plans:
        for key, delta in each.items():
            found.setdefault(key, []).append(delta)
    return {key: Change(key, deltas[0].part, tuple(deltas)) for key, deltas in found.items()}


@dataclass(frozen=True)
class _Target:
    """One module or stacked parameter that the adapter's settings name, and the tensors on disk that make it."""

    name: str  # as PEFT matches patterns
    path: str  # as PEFT names its factors
    part: str
    keys: tuple[tuple[str, ...], ...]  # by tensor along the expert axis, then along the output axis
    experts: int = 1
    transposed: bool = False


def plan(
    base: CheckpointReader, adapter: Adapter, family: Family, weight: float = 1.0, owner: int = 0
) -> dict[str, Delta]:
    """Every on-disk tensor that the adapter changes, `weight` times.

    Raises WeightsError (all problems at once) for factors that match nothing in the base, for targets without factors,
    and for shapes or ranks that do not fit.
    """
    targets = list(_targets(base_layout(base, family), adapter, family))
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
        found = _deltas(base, adapter, target, weight, owner)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            deltas |= {delta.key: delta for delta in found}
    if problems:
        raise WeightsError(problems)
    return deltas


def _deltas(
    base: CheckpointReader, adapter: Adapter, target: _Target, weight: float, owner: int
) -> list[Delta] | Problem:
    # The matrix of one expert, for each of the tensors that lie along its output axis; the first key stands for all.
    shapes = [(int(shape[-2]), int(shape[-1])) for shape in (base.info(key).shape for key in target.keys[0])]
    problem = _misfit(adapter, target, shapes)
    if problem is not None:
        return problem
    deltas = []
    for expert, keys in enumerate(target.keys):
        first_row = 0
        for key, shape in zip(keys, shapes, strict=True):
            delta = Delta(
                key=key,
                part=target.part,
                owner=owner,
                path=target.path,
                pair=adapter.pairs[target.path],
                scale=weight * adapter.scale(target.name),
                experts=target.experts,
                expert=expert,
                first_row=first_row,
                shape=shape,
                transposed=target.transposed,
            )
            deltas.append(delta)
            first_row += shape[0]
    return deltas


def _misfit(adapter: Adapter, target: _Target, shapes: list[tuple[int, int]]) -> Problem | None:
    """What is wrong with the factors' shapes, if anything."""
    pair, r = adapter.pairs[target.path], adapter.rank(target.name)
    rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
    inputs, outputs = (rows, columns) if target.transposed else (columns, rows)
    expected = ((target.experts * r, inputs), (outputs, target.experts * r))
    if (pair.a.shape, pair.b.shape) == expected:
        return None
    where = f"{adapter.folder / WEIGHTS_FILE}: {PREFIX}{target.path}"
    got = f"A {list(pair.a.shape)} and B {list(pair.b.shape)}"
    do = f"A {list(expected[0])} and B {list(expected[1])} fit r={r} and the base"
    if target.experts > 1:
        do += f" of {target.experts} experts"
    if (pair.a.shape[1], pair.b.shape[0]) == (outputs, inputs) != (inputs, outputs):
        return Problem(where, "made for another layout: input and output are swapped", do, got)
    return Problem(where, "shape or rank does not fit", do, got)


def _targets(layout: BaseLayout, adapter: Adapter, family: Family) -> Iterator[_Target]:
    """What the adapter's settings name in this base, by PEFT's own matching rules."""
    transposed = family.moe is not None and family.moe.transposed
    by_module: dict[str, list[Stack]] = {}
    for stack in layout.stacks:
        if _names_parameter(adapter.settings, stack.name):
            by_module.setdefault(stack.module, []).append(stack)
    for module, stacks in by_module.items():
        # PEFT wraps the parameters of one module in their order, each around the one before: the last is outermost.
        for depth, stack in enumerate(reversed(stacks)):
            path = module + ".base_layer" * depth
            yield _Target(stack.name, path, "experts", stack.keys, stack.experts, transposed)
    for key, module in layout.modules.items():
        if _names_parameter(adapter.settings, f"{module}.weight"):
            yield _Target(f"{module}.weight", module, family.part(module), ((key,),))
        elif _names_module(adapter.settings, module):
            yield _Target(module, module, family.part(module), ((key,),))


def _names_parameter(settings: dict[str, Any], name: str) -> bool:
    targets = settings.get("target_parameters") or ()
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _names_module(settings: dict[str, Any], name: str) -> bool:
    from peft.tuners.tuners_utils import check_target_module_exists

    config = SimpleNamespace(**{**settings, "target_modules": settings.get("target_modules") or []})
    return bool(check_target_module_exists(config, name))
