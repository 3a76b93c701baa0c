"""Checkpointing changes no value and no gradient, the balance term's included, and keeps the routing."""

import gc
import weakref
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import transient_bytes
from finetune.methods.router_term import RouterTerm
from finetune.moe.checkpointing import Kept, enable_checkpointing
from finetune.moe.families import FAMILIES
from finetune.moe.lora import FactoredStackLora
from finetune.recipe import RouterSettings
from finetune.recipe.settings import Recomputation
from tests.families import save_tiny
from tests.support import save_tiny_mixtral
from tests.unit.engine import IDS, begin_dropout, trained_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("base"))


def losses(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy and balance term of one forward, with frequencies that are not uniform."""
    term = RouterTerm(model, FAMILIES["mixtral"], RouterSettings(router_aux_loss_coef=1.0))
    term.balance.frequency_LE = torch.tensor([[0.9, 0.6, 0.3, 0.2], [0.1, 0.4, 0.8, 0.7]])
    term.begin_step(torch.tensor(IDS.numel()), logged=True)
    with term.capture() as record:
        ce = model(IDS, labels=IDS, use_cache=False).loss
    return ce, term.add(torch.zeros(()), record, torch.ones(IDS.numel()), ranks=1)


def gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True, retain_graph=True))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_changes_neither_values_nor_gradients(base: Path, mode: Recomputation, dropout: float) -> None:
    results = []
    for chosen in ("none", mode):
        model = trained_model(base, targets=["attention", "experts"], lora_dropout=dropout).train()
        enable_checkpointing(model, chosen)
        begin_dropout(model)
        ce, balance = losses(model)
        results.append((ce, balance, gradients(model, ce), gradients(model, balance)))
    (ce, balance, ce_gradients, balance_gradients), with_checkpointing = results
    assert torch.equal(ce, with_checkpointing[0])
    assert torch.equal(balance, with_checkpointing[1])
    for plain, recomputed in zip(
        [*ce_gradients, *balance_gradients], [*with_checkpointing[2], *with_checkpointing[3]], strict=True
    ):
        torch.testing.assert_close(plain, recomputed, atol=1e-7, rtol=1e-6)
    assert sum(gradient.abs().sum().item() for gradient in with_checkpointing[3]) > 1e-3


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("model_type", ["mixtral", "phimoe"])
def test_the_recompute_takes_the_routing_of_the_forward(model_type: str, mode: Recomputation, tmp_path: Path) -> None:
    """The router is made to prefer other experts in the recompute; the choices must stay those of the forward.

    Mixtral's router chooses by `topk`, Phi-3.5-MoE's by `max`.
    """
    model = trained_model(save_tiny(model_type, tmp_path)).train()
    enable_checkpointing(model, mode)
    chosen: list[torch.Tensor] = []
    flipped = {"now": False}

    def disturb(_module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (-args[0],) if flipped["now"] else args

    def remember(_module: Any, _args: Any, output: tuple[torch.Tensor, ...]) -> None:
        chosen.append(output[2].clone())

    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_pre_hook(disturb)
            module.register_forward_hook(remember)
    loss = model(IDS, labels=IDS, use_cache=False).loss
    forward = chosen.copy()
    flipped["now"] = True
    loss.backward()
    recomputed = chosen[len(forward) :]
    assert len(forward) == 2
    assert len(recomputed) == 2
    for first, again in zip(forward, reversed(recomputed), strict=True):
        assert torch.equal(first, again)


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts matrix products of at least the experts' size."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in str(func) and args[1].numel() >= 64 * 96:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_selective_recomputes_no_product_of_the_experts(base: Path) -> None:
    """With it the backward has no more large products than without checkpointing; with `full` it has."""
    counts = {}
    for mode in get_args(Recomputation):
        model = trained_model(base, targets=["attention", "experts"]).train()
        enable_checkpointing(model, mode)
        loss = model(IDS, labels=IDS, use_cache=False).loss
        with _Products() as products:  # type: ignore[no-untyped-call]
            loss.backward()
        counts[mode] = products.count
    assert counts["none"] == counts["selective"] < counts["full"]


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts 4-bit linear layers, and products of r terms."""

    linear = short = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.linear += func is torch.ops.bitsandbytes.gemm_4bit.default
        self.short += func is torch.ops.aten.mm.default and args[0].shape[1] == 4
        return func(*args, **(kwargs or {}))


def test_selective_keeps_4bit_linear_layers_but_not_the_second_product_of_their_adapters(base: Path) -> None:
    """That product is as large as the layer's own and costs next to nothing."""
    calls = {}
    for mode in get_args(Recomputation):
        model = trained_model(base, targets=["attention"]).train()
        enable_checkpointing(model, mode)
        loss = model(IDS, labels=IDS, use_cache=False).loss
        with _Calls() as calls[mode]:  # type: ignore[no-untyped-call]
            loss.backward()
    assert calls["none"].linear == calls["selective"].linear == 0
    assert calls["full"].linear == 2 * 4
    assert calls["full"].short == calls["selective"].short >= calls["none"].short + 2 * 4


def test_memory_falls_from_none_to_selective_to_full(tmp_path: Path) -> None:
    model = trained_model(save_tiny_mixtral(tmp_path, num_hidden_layers=8)).train()

    def step(mode: Recomputation) -> None:
        enable_checkpointing(model, mode)
        model.zero_grad(set_to_none=True)
        model(IDS, labels=IDS, use_cache=False).loss.backward()

    peak = {mode: transient_bytes(partial(step, mode)) for mode in get_args(Recomputation)}
    assert peak["full"] < peak["selective"] < peak["none"]


@pytest.mark.parametrize("mode", get_args(Recomputation))
def test_a_forward_that_no_backward_follows_is_freed(base: Path, mode: Recomputation) -> None:
    model = trained_model(base).train()
    enable_checkpointing(model, mode)

    def kept() -> int:
        gc.collect()
        return sum(type(each) is Kept for each in gc.get_objects())

    before = kept()
    logits = model(IDS, use_cache=False).logits
    assert kept() == before + (0 if mode == "none" else 2)
    del logits
    assert kept() == before


@pytest.mark.parametrize("part", ["mlp.experts", "self_attn.o_proj"])
def test_a_kept_value_that_is_changed_in_place_is_an_error(tmp_path: Path, part: str) -> None:
    """Computed from the changed value, gradients would be wrong."""
    model = trained_model(save_tiny_mixtral(tmp_path, hidden_size=128), load_in_4bit=False, targets=["experts"]).train()
    enable_checkpointing(model, "selective")
    module = model.base_model.model.model.layers[0].get_submodule(part)
    handle = module.register_forward_hook(lambda _module, _args, output: output.mul_(2))
    module.register_forward_hook(lambda _module, _args, output: output.sin())  # needs the values in the recompute
    with pytest.raises(RuntimeError, match="was changed in place; use gradient_checkpointing: none"):
        model(IDS, use_cache=False).logits.sum().backward()
    handle.remove()
    model(IDS, use_cache=False).logits.sum().backward()


@pytest.mark.parametrize("mode", get_args(Recomputation))
def test_checkpointing_holds_no_copy_of_the_factors(
    base: Path, mode: Recomputation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`B` is transposed for the products; only without checkpointing these copies wait for the backward."""
    copies: list[weakref.ref[torch.Tensor]] = []
    factors_of = FactoredStackLora._factors

    def watched(wrapper: FactoredStackLora, adapter: str) -> Any:
        factors = factors_of(wrapper, adapter)
        copies.append(weakref.ref(factors.B))
        return factors

    monkeypatch.setattr(FactoredStackLora, "_factors", watched)
    model = trained_model(base).train()
    enable_checkpointing(model, mode)
    loss = model(IDS, labels=IDS, use_cache=False).loss
    assert len(copies) == 4
    alive = [copy for copy in copies if copy() is not None]
    assert alive == (copies if mode == "none" else [])
    loss.backward()


def test_factors_that_change_between_forward_and_backward_are_an_error(base: Path) -> None:
    model = trained_model(base).train()
    loss = model(IDS, labels=IDS, use_cache=False).loss
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name and "lora_A" in name:
                parameter.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
