"""The order of experts, ranks, inputs and outputs in the two factors of a stack of experts.

PEFT orders `lora_A` by expert, then rank, and `lora_B` by rank, then expert. Unsloth's kernels read `lora_B` by expert,
then rank, until September 2026 (unslothai/unsloth-zoo#1269); its settings name the order since about then (#1232). The
shapes are the same. PEFT 0.17 and 0.18 swapped inputs and outputs of a stack: `lora_A` [E*r, out], `lora_B`
[in, E*r]. A wrong order gives the right norm and wrong values, so it is never guessed: if neither the file's settings
nor its shapes determine it, the user must give it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from finetune.adapters.adapter import CONFIG_FILE, Adapter
from finetune.adapters.record import RECORD_FILE
from finetune.adapters.targets import StackOrder, Target, base_layout, match_all, matching, targets_of
from finetune.checkpoint import CheckpointReader
from finetune.errors import Problem, WeightsError
from finetune.moe.families import Family

# What `--layout` can name: the order, and who writes it.
LAYOUTS = {
    "peft": (StackOrder(), "PEFT since 0.19, Unsloth since September 2026"),
    "peft-0.18": (StackOrder(swapped=True), "PEFT 0.17 and 0.18, which swapped inputs and outputs"),
    "expert-major": (StackOrder(expert_major=True), "Unsloth before September 2026: lora_B by expert, then rank"),
    "expert-major-0.18": (StackOrder(swapped=True, expert_major=True), "the same, saved with PEFT 0.17 or 0.18"),
}
# PEFT swapped inputs and outputs before this version, and has named itself in the settings since 0.18.
UNSWAPPED_SINCE = (0, 19)
RELEASE = re.compile(r"(\d+)\.(\d+)\.\d+(@.*)?")


def resolved_targets(base: CheckpointReader, adapter: Adapter, family: Family) -> list[Target]:
    """Everything that the adapter's settings name in the base, with the order of its stacks' factors.

    Raises WeightsError where the order matters and is not known, and where the one asked for contradicts the file.
    """
    with matching(adapter.folder / CONFIG_FILE):
        targets = list(targets_of(base_layout(base, family), adapter, family))
        match_all(base, adapter, targets)
    others = [target for target in targets if target.experts == 1]
    stacks = _nested([target for target in targets if target.experts > 1], base, adapter)
    if not stacks:
        return targets
    ways = {swapped for swapped in (False, True) if all(_fits(stack, base, adapter, swapped) for stack in stacks)}
    order = _order(adapter, ways, stacks)
    return others + [replace(stack, order=order, transposed=stack.transposed or order.swapped) for stack in stacks]


def _nested(stacks: Sequence[Target], base: CheckpointReader, adapter: Adapter) -> list[Target]:
    """The stacks, with the paths of one module's turned round where only so their shapes fit.

    PEFT wraps parameters in the order in which their module holds them, but quantised ones in that of their names.
    """
    by_module: dict[str, list[Target]] = {}
    for stack in stacks:
        by_module.setdefault(stack.path.split(".base_layer")[0], []).append(stack)
    targets: list[Target] = []
    for group in by_module.values():
        turned = [replace(one, path=other.path) for one, other in zip(group, reversed(group), strict=True)]
        fitting = [
            candidate
            for candidate in (group, turned)
            if any(all(_fits(stack, base, adapter, swapped) for stack in candidate) for swapped in (False, True))
        ]
        targets += fitting[0] if fitting else group
    return targets


def _fits(stack: Target, base: CheckpointReader, adapter: Adapter, swapped: bool) -> bool:
    """Whether the factors have the stack's inputs and outputs, or those in each other's place."""
    pair = adapter.pairs.get(stack.path)
    if pair is None:
        return True  # refused elsewhere
    inputs, outputs = stack.features(base)
    if swapped and stack.transposed:
        return False  # these were never swapped
    return (pair.a.shape[1], pair.b.shape[0]) == ((outputs, inputs) if swapped else (inputs, outputs))


def _order(adapter: Adapter, ways: set[bool], stacks: Sequence[Target]) -> StackOrder:
    """The order of all stacks. `ways`: swapped or not, as their shapes allow; none is refused stack by stack."""
    transposed, many_ranks = stacks[0].transposed, any(adapter.rank(stack.name) > 1 for stack in stacks)
    version = _version(adapter)
    if version is not None and not transposed:
        ways = {version < UNSWAPPED_SINCE}
    fitting = {
        name: order
        for name, (order, _) in LAYOUTS.items()
        # Of a single rank there is no order.
        if order.swapped in ways and (many_ranks or not order.expert_major)
    }
    declared = fitting
    if adapter.layout_recorded:
        declared = {name: order for name, order in fitting.items() if order == StackOrder()}
    elif adapter.expert_major is not None:
        declared = {name: order for name, order in fitting.items() if order.expert_major == adapter.expert_major}
    elif version is not None and not adapter.by_unsloth:
        declared = {name: order for name, order in fitting.items() if not order.expert_major}
    if adapter.asked_layout is not None:
        says = adapter.layout_recorded or adapter.expert_major is not None
        return _asked(adapter, declared if says else fitting, transposed)
    if len(declared) > 1:
        raise WeightsError(_unknown(adapter, declared))
    return next(iter(declared.values()), StackOrder())


def _asked(adapter: Adapter, fitting: Mapping[str, StackOrder], transposed: bool) -> StackOrder:
    """The order that `--layout` names, which must be one of those that fit the file."""
    order, _ = LAYOUTS[str(adapter.asked_layout)]
    if transposed:
        order = replace(order, swapped=False)
    if order in fitting.values():
        return order
    what, do = "--layout contradicts the file", f"leave --layout out, or give {_choices(fitting)}"
    if adapter.layout_recorded:
        what, do = f"the layout is recorded in {RECORD_FILE}, and it is peft", "leave --layout out"
    raise WeightsError(Problem(str(adapter.folder), what, do, got=str(adapter.asked_layout)))


def _unknown(adapter: Adapter, fitting: Mapping[str, StackOrder]) -> Problem:
    got = "Unsloth's own setting" if adapter.by_unsloth else "neither a record nor a version of PEFT"
    what = "the order of the experts' factors is not declared, and a wrong one gives wrong weights"
    where = str(adapter.folder / CONFIG_FILE)
    return Problem(where, what, f"say which tool trained it, with --layout: {_choices(fitting)}", got)


def _choices(fitting: Mapping[str, StackOrder]) -> str:
    return ", ".join(f"{name} ({LAYOUTS[name][1]})" for name in fitting)


def _version(adapter: Adapter) -> tuple[int, int] | None:
    """The release of PEFT that saved the adapter; None where it is not said, or between two releases."""
    match = RELEASE.fullmatch(str(adapter.settings.get("peft_version")))
    return None if match is None else (int(match[1]), int(match[2]))
