"""The arms: one experts module of transformers, run in the ways that people can train it today, and in ours.

T tokens, K experts a token, E experts, H hidden, I intermediate, r LoRA rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.shapes import Routing, Shape
from finetune.moe.experts import EXPERTS_IMPLEMENTATION
from finetune.moe.lora import factor_stacks
from finetune.moe.nf4 import Nf4Stack

STACKS = ("gate_up_proj", "down_proj")
OURS, DENSE, FROZEN = "ours", "ours unquantised", "frozen experts, ours"
PEFT_GROUPED, PEFT_EAGER, FROZEN_STOCK = "PEFT grouped_mm", "PEFT eager", "frozen experts, stock grouped_mm"
ARMS = (OURS, DENSE, FROZEN, PEFT_GROUPED, PEFT_EAGER, FROZEN_STOCK)


class Block(nn.Module):
    """transformers' experts module as one layer holds it."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.config = config
        self.experts = MixtralExperts(config)

    def forward(self, x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """`[T, H]`, as the experts give it."""
        output: torch.Tensor = self.experts(x_TH, index_TK, weight_TK)
        return output


@dataclass(frozen=True)
class Inputs:
    """What the layers around the experts give them: activations, routing, and the gradient of their output."""

    x_TH: torch.Tensor
    routing: Routing
    weight_TK: torch.Tensor
    grad_TH: torch.Tensor


@dataclass(frozen=True)
class Arm:
    """A module and its step: forward and backward, with the gradients of inputs, routing weights and LoRA."""

    name: str
    model: Any
    inputs: Inputs

    @property
    def lora(self) -> dict[str, torch.Tensor]:
        """The trained parameters by name."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def forward(self) -> torch.Tensor:
        """The experts' output `[T, H]`."""
        inputs = self.inputs
        output: torch.Tensor = self.model(inputs.x_TH, inputs.routing.index_TK, inputs.weight_TK)
        return output

    def step(self) -> None:
        """Forward and backward into fresh gradients."""
        for tensor in (self.inputs.x_TH, self.inputs.weight_TK, *self.lora.values()):
            tensor.grad = None
        self.forward().backward(self.inputs.grad_TH)  # type: ignore[no-untyped-call]


def make_inputs(shape: Shape, routing: Routing, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Random activations and gradient, seeded by the shape alone."""
    generator = torch.Generator().manual_seed(1)
    x_TH = torch.randn(shape.tokens, shape.hidden, generator=generator)
    grad_TH = torch.randn(shape.tokens, shape.hidden, generator=generator)
    placed = Routing(routing.index_TK.to(device), routing.weight_TK.to(device), routing.skew)  # weights: fp32, always
    x_TH = x_TH.to(device, dtype).requires_grad_()
    return Inputs(x_TH, placed, placed.weight_TK.clone().requires_grad_(), grad_TH.to(device, dtype))


def dense_block(shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Block:
    """Frozen random experts at transformers' usual scale, in `dtype`."""
    config = MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    with torch.device("meta"):
        block = Block(config)
    generator = torch.Generator(device).manual_seed(seed)
    for name in STACKS:
        weight_EOI = torch.empty(getattr(block.experts, name).shape, dtype=dtype, device=device)
        weight_EOI.normal_(std=0.02, generator=generator)
        setattr(block.experts, name, nn.Parameter(weight_EOI, requires_grad=False))
    return block


def quantise(block: Block) -> Block:
    """Replace the dense stacks by 4-bit ones."""
    for name in STACKS:
        stack = Nf4Stack.quantize(getattr(block.experts, name).data)
        setattr(block.experts, name, nn.Parameter(stack, requires_grad=False))
    return block


def adapt(block: Block, shape: Shape, implementation: str, factored: bool, seed: int = 0) -> Any:
    """A fresh adapter on both stacks: ours (factored), or PEFT's own. Factors are not zero, as after some training."""
    block.config._experts_implementation = implementation
    targets = [f"experts.{name}" for name in STACKS]
    torch.manual_seed(seed)
    config = LoraConfig(r=shape.rank, lora_alpha=2 * shape.rank, target_modules=[], target_parameters=targets)
    model = get_peft_model(block, config)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
            assert ".lora_" in name
    if factored:
        factor_stacks(model)
    return model


def build(name: str, shape: Shape, inputs: Inputs) -> Arm:
    """One arm at one shape, on the device and in the dtype of its inputs."""
    block = dense_block(shape, inputs.x_TH.dtype, str(inputs.x_TH.device))
    makers: dict[str, Callable[[], Any]] = {
        OURS: lambda: adapt(quantise(block), shape, EXPERTS_IMPLEMENTATION, factored=True),
        DENSE: lambda: adapt(block, shape, EXPERTS_IMPLEMENTATION, factored=True),
        FROZEN: lambda: _implemented(quantise(block), EXPERTS_IMPLEMENTATION),
        PEFT_GROUPED: lambda: adapt(block, shape, "grouped_mm", factored=False),
        PEFT_EAGER: lambda: adapt(block, shape, "eager", factored=False),
        FROZEN_STOCK: lambda: _implemented(block, "grouped_mm"),
    }
    return Arm(name, makers[name](), inputs)


def _implemented(block: Block, implementation: str) -> Block:
    block.config._experts_implementation = implementation
    return block


def disagreement(one: Arm, other: Arm) -> float:
    """Largest difference of outputs and LoRA gradients of two arms of equal values, over the largest value."""
    worst = _difference(one.forward(), other.forward())
    one.step()
    mine = {name: value.grad for name, value in one.lora.items()}
    other.step()
    for name, value in other.lora.items():
        worst = max(worst, _difference(mine[name], value.grad))
    return worst


def _difference(one: torch.Tensor | None, other: torch.Tensor | None) -> float:
    assert one is not None
    assert other is not None
    return float((one.detach().float() - other.detach().float()).abs().max() / other.detach().float().abs().max())
