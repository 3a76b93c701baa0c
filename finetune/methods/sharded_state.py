"""Optimizer states of a sharded model: whole on disk, in parts in memory.

A checkpoint holds the whole state whatever the number of processes, so that a run continues on another number of
them, or on one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from finetune.moe.sharding import part_of, whole


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
