"""Adapters of transformers 4 on a model of transformers 5, through stock PEFT: a Linear for each expert and router.

The experts of the loaded model are stacked parameters. Modules with the names that transformers 4 gave them are laid
over the same memory, so that PEFT finds what the adapter's own settings name (patterns, dropout and all), and what it
merges there is in the model. PEFT's own conversion of such adapters takes no dropout, no pattern of ranks, and scales
rank-stabilised ones otherwise than they were trained.
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from finetune.adapters.targets import ALL_LINEAR
from finetune.moe.families import Family


def unstacked_modules(model: Any, index: int, family: Family, config: PeftConfig) -> nn.Module:
    """The linear modules and embeddings of `model` as a tree, with those of transformers 4 for the stacks and router.

    Only decoder layer `index` of the model is whole.
    """
    root = nn.Module()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            _put(root, path, module)
    for name, weight in _matrices(model.get_decoder().layers[index], family):
        _put(root, f"model.layers.{index}.{name}", _linear(weight))
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        root._modules.pop("lm_head", None)  # PEFT leaves it out of a whole model
    return root


def _matrices(layer: nn.Module, family: Family) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of experts and router, where the layer has them, by the names that their modules had."""
    moe, held = family.moe, dict(layer.named_parameters())
    if moe is None or moe.router_parameter not in held:
        return
    yield moe.disk_router.removesuffix(".weight"), held[moe.router_parameter].detach()
    for stack in moe.stacks if moe.per_expert else ():
        stack_EOI = held[f"{moe.experts_module}.{stack.parameter}"].detach()
        for name, part_EOI in zip(stack.disk_names, stack_EOI.chunk(len(stack.disk_names), dim=1), strict=True):
            for expert, weight_OI in enumerate(part_EOI):
                yield moe.disk_expert.format(expert=expert, name=name).removesuffix(".weight"), weight_OI


def _linear(weight: torch.Tensor) -> nn.Linear:
    """A Linear over the memory of `weight`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, last = path.split(".")
    node = root
    for name in parents:
        if name not in node._modules:
            node.add_module(name, nn.Module())
        node = node.get_submodule(name)
    node.add_module(last, module)
