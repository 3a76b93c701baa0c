"""The optimizer of a sharded model, and its state: whole on disk, in parts in memory.

A checkpoint holds the whole state whatever the number of processes, so that a run continues on another number of
them, or on one. The states of bitsandbytes' optimizers are quantised in blocks of each process's part: of these every
process's own is kept, and a run continues on as many processes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import distributed
from torch.distributed.tensor import DTensor

from finetune.errors import Problem, RunError
from finetune.methods.training_state import snapshot
from finetune.moe.sharding import local, part_of, whole


class _Part(torch.nn.Parameter):
    """This process's part of a sharded parameter, `of`, sharing its memory."""

    of: torch.nn.Parameter


def step_on_parts(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer of bitsandbytes, whose kernels take no DTensor, step on this process's part of each parameter.

    Nothing is done to other optimizers, or where nothing is sharded.
    """
    pairs = [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
    if not isinstance(optimizer, Optimizer8bit) or not any(isinstance(each, DTensor) for _, each in pairs):
        return
    for group in optimizer.param_groups:
        group["params"] = [_part(parameter) for parameter in group["params"]]

    def lend(*_: Any) -> None:
        for part in _parts(optimizer):
            part.data = local(part.of.detach())
            # An empty part has nothing to step on, and the kernels divide by its size.
            part.grad = local(part.of.grad) if part.of.grad is not None and part.numel() else None

    def give_back(*_: Any) -> None:
        for part in _parts(optimizer):
            part.grad = None

    optimizer.register_step_pre_hook(lend)
    optimizer.register_step_post_hook(give_back)


def _part(parameter: torch.nn.Parameter) -> _Part:
    part = _Part(local(parameter.detach()))
    part.of = parameter
    return part


def _parts(optimizer: Any) -> list[_Part]:
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [parameter for parameter in parameters if isinstance(parameter, _Part)]


def stepped_parameters(optimizer: Any) -> list[torch.nn.Parameter]:
    """The model's parameters on which an optimizer steps, also in parts."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [parameter.of if isinstance(parameter, _Part) else parameter for parameter in parameters]


def state_on_main(optimizer: Any, is_main: bool) -> dict[str, Any]:
    """The optimizer's `state_dict` for a checkpoint; every process must call it, only the main one's is whole."""
    state = optimizer.state_dict()
    if not _parts(optimizer):
        whole_state: dict[str, Any] = gathered(state, keep=is_main)
        return whole_state
    states: list[Any] = [None] * distributed.get_world_size() if is_main else []
    distributed.gather_object(snapshot(state), states if is_main else None)
    return {"parts": states}


def load_state(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Continue from `state_on_main`; RunError where that was made in other parts than `optimizer` has."""
    parts = state.get("parts")
    before = 1 if parts is None else len(parts)
    now = distributed.get_world_size() if _parts(optimizer) else 1
    if before != now:
        what = f"a bitsandbytes optimizer's states are quantised in blocks of each process's part, of {before} parts"
        do = f"continue on {before} with the launcher file of the first start, or start anew with adamw_torch"
        raise RunError(Problem("training.optim", what, do, got=f"{now} parts"))
    if parts is None:
        optimizer.load_state_dict(parts_of_state(state, optimizer.param_groups))
    else:
        optimizer.load_state_dict(parts[distributed.get_rank()])


def gathered(tree: Any, keep: bool) -> Any:
    """The tree with whole tensors in place of sharded ones, on the CPU; every process must call it.

    `keep`: whether this process needs them; where it does not, each is freed before the next is gathered.
    """
    if isinstance(tree, DTensor):
        tensor = whole(tree.detach())
        return tensor.cpu() if keep else None
    if isinstance(tree, Mapping):
        return {key: gathered(value, keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(value, keep) for value in tree)
    return tree


def parts_of_state(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An optimizer's `state_dict` with this process's part of each tensor that is as large as its parameter."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    of_number = dict(zip(numbers, parameters, strict=True))

    def part(value: Any, parameter: torch.Tensor) -> Any:
        is_whole = isinstance(value, torch.Tensor) and value.shape == parameter.shape
        return part_of(value, parameter) if is_whole else value

    values = {
        number: {name: part(value, of_number[number]) for name, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return {**state, "state": values}
