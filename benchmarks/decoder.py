"""Whole decoder layers as arms: attention and experts, with LoRA on both, in ours and in what people use.

T tokens of a step, S tokens of a sequence, H hidden, K experts a token, E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.arms import DENSE, FROZEN, OURS, PEFT_EAGER, PEFT_GROUPED
from benchmarks.mixtral import adapt_mixtral, mixtral_config, random_mixtral
from benchmarks.shapes import Shape, draw_routing
from finetune.moe.checkpointing import enable_checkpointing
from finetune.moe.experts import EXPERTS_IMPLEMENTATION
from finetune.recipe.settings import Recomputation

DECODER_ARMS = (OURS, DENSE, FROZEN, PEFT_GROUPED, PEFT_EAGER)
STOCK = {PEFT_GROUPED: "grouped_mm", PEFT_EAGER: "eager"}


class DrawnRouter(nn.Module):
    """A router whose choices are drawn beforehand; scores and their gradient are its own, in float32.

    Every arm then sends the same tokens to the same experts, as unevenly as `draw_routing` says.
    """

    def __init__(self, router: Any, layer: int) -> None:
        super().__init__()
        self.weight, self.layer = router.weight, layer
        self.index_TK: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits `[T, E]`, scores and choices `[T, K]`, as Mixtral's router gives them."""
        assert self.index_TK is not None
        logits_TE = functional.linear(x.reshape(-1, x.shape[-1]), self.weight)
        score_TK = logits_TE.float().softmax(-1).gather(-1, self.index_TK)
        return logits_TE, score_TK / score_TK.sum(-1, keepdim=True), self.index_TK


def draw_routers(model: Any) -> None:
    """Replace the routers of a fresh Mixtral."""
    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate = DrawnRouter(layer.mlp.gate, number)


def route(model: Any, shape: Shape, tokens: int) -> float:
    """Draw the choices of a step of `tokens`, another for each layer; the mean skew (busiest expert / mean)."""
    routers = [module for module in model.modules() if isinstance(module, DrawnRouter)]
    skews = []
    for router in routers:
        routing = draw_routing(replace(shape, tokens=tokens), seed=router.layer)
        router.index_TK = routing.index_TK.to(router.weight.device)
        skews.append(routing.skew)
    return sum(skews) / len(skews)


@dataclass
class DecoderArm:
    """Decoder layers without the head, as in the middle of a model: their input has a gradient, too."""

    name: str
    model: Any
    shape: Shape
    input_BSH: torch.Tensor | None = None
    grad_BSH: torch.Tensor | None = None

    def prepare(self, tokens: int, sequence: int, mode: Recomputation) -> None:
        """Inputs of a step and the setting of recomputation."""
        weight = next(self.model.parameters())
        generator = torch.Generator(weight.device).manual_seed(2)
        size = (tokens // sequence, sequence, self.shape.hidden)
        for name in ("input_BSH", "grad_BSH"):
            value = torch.empty(size, device=weight.device).normal_(generator=generator).to(torch.bfloat16)
            setattr(self, name, value.requires_grad_(name == "input_BSH"))
        route(self.model, self.shape, tokens)
        if self.name in STOCK and mode == "full":  # with transformers' own, as others use it
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            enable_checkpointing(self.model, mode)

    def release(self) -> None:
        """Forget inputs and gradients."""
        self.input_BSH = self.grad_BSH = None
        self.model.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Forward and backward into fresh gradients."""
        assert self.input_BSH is not None
        self.model.zero_grad(set_to_none=True)
        self.input_BSH.grad = None
        decoder = self.model.get_base_model().model
        decoder(inputs_embeds=self.input_BSH, use_cache=False).last_hidden_state.backward(self.grad_BSH)


def build_decoder(name: str, shape: Shape, layers: int, device: str) -> DecoderArm:
    """Attention in NF4 in every arm, as `load_in_4bit` makes it; the experts are what the arms differ in."""
    config = mixtral_config(shape, layers, vocabulary=512)
    experts_4bit = name in (OURS, FROZEN)
    model = random_mixtral(config, torch.bfloat16, device, quantised=True, quantised_experts=experts_4bit)
    draw_routers(model)
    implementation = STOCK.get(name, EXPERTS_IMPLEMENTATION)
    adapted = adapt_mixtral(
        model, shape.rank, implementation, factored=name not in STOCK, experts_adapted=name != FROZEN
    )
    return DecoderArm(name, adapted, shape)


@contextmanager
def prepared(arms: dict[str, DecoderArm], tokens: int, sequence: int, mode: Recomputation) -> Iterator[None]:
    """All arms ready for the same step; what they hold for it is released afterwards, whatever happens."""
    try:
        for arm in arms.values():
            arm.prepare(tokens, sequence, mode)
        yield
    finally:
        for arm in arms.values():
            arm.release()
