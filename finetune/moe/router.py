"""Routers: find them, record their decisions in a forward, and compare two sets of decisions.

Every router that transformers dispatches through its `ExpertsInterface` returns (logits, weights, indices); a forward
hook reads them. Only some of the layers may be MoE layers. Decisions are compared with the base model's; the overlap of
two models or two answers is the share of tokens with equal sets of experts. No host sync.

T tokens, E experts, K experts a token, L MoE layers, B pairs, W tokens of the longest answer.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from finetune.errors import Problem, WeightsError
from finetune.moe.audit import part_of
from finetune.moe.checkpointing import kept_values
from finetune.moe.families import Family
from finetune.upstream import clean_name, require_reads

require_reads("peft.tuners.tuners_utils:BaseTunerLayer.disable_adapters")


@dataclass(frozen=True)
class Router:
    """One layer's router. `called` is what the model calls: under an adapter PEFT's wrapper of `module`."""

    name: str  # model.layers.3.mlp.gate
    called: torch.nn.Module
    module: torch.nn.Module

    @property
    def layer(self) -> int:
        """Number of its decoder layer."""
        return int(re.findall(r"\.(\d+)\.", self.name)[-1])

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.module.num_experts)  # type: ignore[arg-type]

    @property
    def top_k(self) -> int:
        """K."""
        return int(self.module.top_k)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.module.parameters()).device

    @property
    def adapted(self) -> bool:
        """Whether an adapter changes it."""
        return any(isinstance(module, BaseTunerLayer) for module in self.called.modules())

    @property
    def draws(self) -> bool:
        """Whether it samples experts, as Phi-3.5-MoE's does in training."""
        return self.module.training and bool(getattr(self.module, "router_jitter_noise", 0))


@dataclass
class RouterRecord:
    """Routing of one forward: per layer logits `[T, E]` (with gradient) and chosen experts `[T, K]`.

    `changed`: per layer 1 for each token whose experts differ from the base router's choice, `[T]`; empty if not
    requested.
    """

    logits: list[torch.Tensor] = field(default_factory=list)
    indices: list[torch.Tensor] = field(default_factory=list)
    changed: list[torch.Tensor] = field(default_factory=list)


def find_routers(model: torch.nn.Module, router_module: str) -> list[Router]:
    """The router of each MoE layer, in order."""
    routers = []
    for name, module in model.named_modules():
        if name.endswith(f".{router_module}"):
            get_base_layer = getattr(module, "get_base_layer", None)
            routers.append(Router(clean_name(name), module, module if get_base_layer is None else get_base_layer()))
    if not routers:
        raise WeightsError(
            Problem(router_module, "the loaded model has no router of this name", "report this architecture")
        )
    sizes = sorted({router.num_experts for router in routers})
    if len(sizes) > 1:
        raise WeightsError(
            Problem(router_module, "layers with different numbers of experts", "report this model", got=str(sizes))
        )
    return routers


_BESIDE_ROUTERS = ("experts", "shared_experts", "mlp")


def reached_routers(model: torch.nn.Module, family: Family) -> list[Router]:
    """The routers whose logits depend on a parameter that is trained: their terms of the loss have a gradient.

    A router reads the residual stream after the attention of its layer; nothing is run.
    """
    assert family.moe is not None
    trained = [clean_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        router
        for router in find_routers(model, family.moe.router_module)
        if any(_comes_before(name, router, family) for name in trained)
    ]


def _comes_before(parameter: str, router: Router, family: Family) -> bool:
    """Whether a parameter (its cleaned name) changes the router or what it reads."""
    layers, _, _ = router.name.rpartition(f".{router.layer}.")
    found = re.match(rf"{re.escape(layers)}\.(\d+)\.", parameter)
    part = part_of(parameter, family)
    if found is None:
        return part == "embeddings"
    if int(found[1]) != router.layer or part == "router":
        return int(found[1]) <= router.layer
    block, _, _ = router.name.rpartition(".")
    return part not in _BESIDE_ROUTERS and not parameter.startswith(f"{block}.")


AsBase = Callable[[int], AbstractContextManager[Any]]
"""Restores the base model's values of parameters that are not the adapter's, for the router at a position."""


@contextmanager
def capture(routers: list[Router], as_base: AsBase | None = None) -> Iterator[RouterRecord]:
    """Record the routers' outputs during the block. Checkpointing's recompute runs outside of it.

    With `as_base` the base model's router also chooses experts for the same hidden states.
    """
    record = RouterRecord()
    asking_base = False

    def keep(_module: torch.nn.Module, _args: Any, output: tuple[torch.Tensor, ...]) -> None:
        if not asking_base:
            record.logits.append(output[0])
            record.indices.append(output[2])

    def ask_base(called: torch.nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
        nonlocal asking_base
        if as_base is not None and not asking_base:
            asking_base = True
            with as_base(len(record.changed)):
                record.changed.append(changed_sets(output[2], base_choice(called, args)))
            asking_base = False

    handles = [router.module.register_forward_hook(keep) for router in routers]
    handles += [router.called.register_forward_hook(ask_base) for router in routers if as_base is not None]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def base_choice(called: torch.nn.Module, args: tuple[Any, ...]) -> torch.Tensor:
    """The experts `[T, K]` that the router chooses for the same input without its adapter.

    It runs inside a layer that may be checkpointed: nothing is kept for the recompute, which does not repeat it.
    """
    layers = [module for module in called.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    # PEFT's own switch, enable_adapters, would also change which parameters train.
    for layer in layers:
        layer._disable_adapters = True
    try:
        kept = kept_values()
        with torch.no_grad(), nullcontext() if kept is None else kept.apart():
            indices: torch.Tensor = called(*args)[2]
            return indices
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


def changed_sets(indices_TK: torch.Tensor, other_TK: torch.Tensor) -> torch.Tensor:
    """1 for each token whose two sets of experts differ, ignoring order; `[T]`, float32."""
    different_TK = indices_TK.sort(-1).values != other_TK.sort(-1).values
    return different_TK.any(-1).to(torch.float32)


@dataclass(frozen=True)
class Overlap:
    """Sums over tokens, additive over micro-batches, steps and ranks."""

    same_L: torch.Tensor  # compared tokens whose sets of experts are equal, by layer; float32
    tokens: torch.Tensor  # compared tokens; a float32 scalar

    def __add__(self, other: "Overlap") -> "Overlap":
        return Overlap(self.same_L + other.same_L, self.tokens + other.tokens)


def policy_overlap(policy: RouterRecord, reference: RouterRecord, weight_T: torch.Tensor) -> Overlap:
    """Policy against reference on the same batch; `weight_T`: how often each token counts, 0 for padding."""
    weight_T = weight_T.reshape(-1).to(torch.float32)
    return _overlap(policy.indices, reference.indices, weight_T)


def answer_overlap(record: RouterRecord, answer_index: torch.Tensor, answer_length: torch.Tensor) -> Overlap:
    """The j-th token of the chosen answer against the j-th of the rejected one, up to the shorter answer's length.

    `answer_index` `[2B, W]`: position that predicts the j-th token, chosen answers first; `answer_length` `[2B]`.
    """
    chosen_BW, rejected_BW = answer_index.chunk(2)
    common_B = torch.minimum(*answer_length.chunk(2))
    both_BW = torch.arange(answer_index.shape[1], device=answer_index.device) < common_B.unsqueeze(-1)
    # A token directly follows the position that predicts it.
    positions = [(position_BW + 1).reshape(-1) for position_BW in (chosen_BW, rejected_BW)]
    chosen, rejected = ([index_TK[position] for index_TK in record.indices] for position in positions)
    return _overlap(chosen, rejected, both_BW.reshape(-1).to(torch.float32))


def _overlap(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], weight_T: torch.Tensor) -> Overlap:
    changed = [changed_sets(*indices) for indices in zip(ours, theirs, strict=True)]
    total = weight_T.sum()
    return Overlap(total - torch.stack([(changed_T * weight_T).sum() for changed_T in changed]), total)
