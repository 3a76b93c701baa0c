"""Routers of every architecture of the table: found, captured once, compared with the base's, balanced by a bias."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.base import checkpoint_family
from finetune.errors import RecipeError
from finetune.methods.router_term import RouterTerm
from finetune.moe.audit import clean_name, part_of
from finetune.moe.balance import token_sums
from finetune.moe.checkpointing import enable_checkpointing
from finetune.moe.experts import EXPERTS_IMPLEMENTATION
from finetune.moe.families import FAMILIES, Family
from finetune.moe.router import capture, find_routers, reached_routers
from finetune.recipe import LoraSettings, RouterSettings
from tests.bases import with_lora
from tests.equivalence.sft_runs import recipe
from tests.families import save_tiny, tiny_model
from tests.support import save_tiny_mixtral

MOE = {name: family for name, family in FAMILIES.items() if family.moe is not None}
BIASED = [name for name, family in MOE.items() if family.moe is not None and family.moe.correction_bias]
IDS = torch.arange(4, 44).reshape(2, 20)


def term_of(model: Any, family: Family, **settings: Any) -> RouterTerm:
    return RouterTerm(model, family, RouterSettings(**{"router_aux_loss_coef": 0.5, **settings}))


def with_trained_router(model: Any) -> Any:
    """An adapter on the routers alone, moved far enough that it changes choices."""
    adapted = with_lora(model, LoraSettings(targets=["router"], r=4, lora_alpha=8.0))
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return adapted


@pytest.mark.parametrize("family", MOE.values(), ids=MOE)
def test_balance_counts_what_the_experts_were_given_once_and_only_real_tokens(family: Family) -> None:
    """Under checkpointing, whose recompute is not counted again, and with the comparison with the base router on."""
    model = with_trained_router(tiny_model(family.model_type)).train()
    enable_checkpointing(model, "full")
    term = term_of(model, family)
    given: list[torch.Tensor] = []
    assert family.moe is not None
    experts = [module for name, module in model.named_modules() if name.endswith(f".{family.moe.experts_module}")]
    handles = [module.register_forward_hook(lambda _m, args, _o: given.append(args[1])) for module in experts]
    real_T = torch.tensor([[1] * 20, [1] * 12 + [0] * 8]).reshape(-1)
    term.begin_step(real_T.sum(), logged=True)
    with term.capture() as record:
        loss = model(IDS, labels=IDS, use_cache=False).loss
    for handle in handles:
        handle.remove()
    layers = len(term.routers)
    torch.autograd.backward(term.add(loss, record, real_T, ranks=1))
    assert len(record.logits) == len(record.indices) == len(given) == len(experts) == layers
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(record.indices, given, strict=True))
    counts = token_sums(record, real_T).count_LE
    assert counts.sum(-1).tolist() == [32.0 * term.routers[0].top_k] * layers
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in model.parameters()
        if parameter.requires_grad
    )


@pytest.mark.parametrize("family", MOE.values(), ids=MOE)
def test_the_base_router_is_asked_on_the_same_hidden_states(family: Family) -> None:
    """Held against a second model that never had an adapter, layer by layer."""
    assert family.moe is not None
    pristine = find_routers(tiny_model(family.model_type), family.moe.router_module)
    model = with_trained_router(tiny_model(family.model_type))
    term = term_of(model, family)
    inputs: list[Any] = []
    for router in term.routers:
        router.called.register_forward_hook(lambda _m, args, _o: inputs.append(args))
    term.begin_step(torch.tensor(40), logged=True)
    with torch.no_grad(), term.capture() as record:
        model(IDS, use_cache=False)
    asked = inputs[::2] if len(inputs) == 2 * len(term.routers) else inputs
    changed = 0.0
    for position, (router, args) in enumerate(zip(pristine, asked, strict=True)):
        with torch.no_grad():
            theirs = router.called(*args)[2]
        different_T = torch.tensor(
            [
                set(one) != set(other)
                for one, other in zip(record.indices[position].tolist(), theirs.tolist(), strict=True)
            ]
        )
        assert torch.equal(record.changed[position], different_T.float())
        changed += different_T.float().mean().item()
    assert 0 < changed < len(pristine)


@pytest.mark.parametrize("family", MOE.values(), ids=MOE)
def test_the_routers_that_training_reaches_are_those_whose_logits_have_a_gradient(family: Family) -> None:
    """Held against autograd, each part of the model trained alone, and each in the last layer alone."""
    model = tiny_model(family.model_type)
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    model = with_lora(model, LoraSettings(targets=list(family.targets), r=2, lora_alpha=4.0))
    assert family.moe is not None
    routers = find_routers(model, family.moe.router_module)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts = [part_of(clean_name(name), family) for name, _ in trained]
    last = f".{routers[-1].layer}."
    found = set()
    for part in set(parts):
        for place in ("", last):
            for (name, parameter), its_part in zip(trained, parts, strict=True):
                parameter.requires_grad_(its_part == part and place in name)
            with capture(routers) as record:
                model(IDS[:1, :4], use_cache=False)
            reached = [router.name for router in reached_routers(model, family)]
            wanted = [r.name for r, logits in zip(routers, record.logits, strict=True) if logits.requires_grad]
            assert reached == wanted, (part, place)
            found.add(len(reached))
    assert {0, len(routers)} <= found


def test_a_coefficient_of_a_term_without_gradient_is_refused_before_loading(tmp_path: Path) -> None:
    """One layer with experts, or experts in the last layer alone: nothing that is trained comes before the router."""
    last: dict[str, Any] = {"num_hidden_layers": 3, "first_k_dense_replace": 2}
    tiny = save_tiny_mixtral(tmp_path / "tiny", num_hidden_layers=1)
    deep = save_tiny("deepseek_v3", tmp_path / "deep", **last)
    both = {"router_aux_loss_coef": 0.02, "router_z_loss_coef": 0.1}
    for folder, targets, refused in (
        (tiny, ["experts"], True),
        (tiny, ["attention"], False),
        (tiny, ["experts", "router"], False),
        (tiny, ["o_proj"], False),
        (deep, ["experts"], True),
        (deep, ["shared_experts"], True),
        (deep, ["experts", "mlp"], False),
    ):
        settings = recipe(folder, tmp_path / "rows", tmp_path / "out", both)
        settings = settings.model_copy(update={"lora": settings.lora.model_copy(update={"targets": targets})})
        if not refused:
            checkpoint_family(folder, settings)
            continue
        with pytest.raises(RecipeError) as raised:
            checkpoint_family(folder, settings)
        assert str(raised.value).splitlines() == [
            f"router.{key}: the {term} has no effect: nothing that lora.targets trains comes before a router of this "
            f"checkpoint; got {value}; write 0, or add router or attention to lora.targets"
            for key, term, value in (
                ("router_aux_loss_coef", "balance term", 0.02),
                ("router_z_loss_coef", "z-loss", 0.1),
            )
        ], targets
        off = settings.model_copy(update={"router": RouterSettings(router_aux_loss_coef=0)})
        checkpoint_family(folder, off)


def test_a_frozen_router_is_not_compared() -> None:
    model = with_lora(tiny_model("mixtral"), LoraSettings(targets=["attention"], r=4, lora_alpha=8.0))
    term = term_of(model, FAMILIES["mixtral"])
    term.begin_step(torch.tensor(40), logged=True)
    with torch.no_grad(), term.capture() as record:
        loss = model(IDS, labels=IDS, use_cache=False).loss
        term.add(loss, record, torch.ones(40), ranks=1)
    term.end_step(lambda x: x)
    assert record.changed == []
    scalars, load = term.figures()
    assert "router/changed" not in scalars
    assert "changed" not in load


@pytest.mark.parametrize("model_type", BIASED)
def test_bias_balance_moves_the_choice_towards_the_mean_load(model_type: str) -> None:
    family = FAMILIES[model_type]
    model = tiny_model(model_type)
    term = term_of(model, family, router_aux_loss_coef=0.0, bias_update_rate=0.02)
    assert term.bias is not None
    assert len(term.bias.biases) == len(term.routers)
    before = [bias.clone() for bias in term.bias.biases.values()]
    spread = []
    for _ in range(40):
        term.begin_step(torch.tensor(40), logged=True)
        with torch.no_grad(), term.capture() as record:
            term.add(model(IDS, labels=IDS, use_cache=False).loss, record, torch.ones(40), ranks=1)
        term.end_step(lambda x: x)
        scalars, load = term.figures()
        spread.append(scalars["router/max_load"])
        if len(spread) == 1:
            for bias, old, tokens in zip(term.bias.biases.values(), before, load["tokens"], strict=True):
                mean = sum(tokens) / len(tokens)
                wanted = [0.02 * ((count < mean) - (count > mean)) for count in tokens]
                assert (bias - old).flatten().tolist() == pytest.approx(wanted, abs=1e-6)
            assert scalars["router/changed"] == 0, "the base router's bias is still the same"
    assert min(spread[20:]) < spread[0] - 0.1
    assert scalars["router/changed"] > 0, "the moved bias counts as a change of the router"


def test_bias_balance_is_refused_by_name_where_the_routers_carry_no_bias(tmp_path: Path) -> None:
    base = save_tiny_mixtral(tmp_path / "base")
    settings = recipe(base, tmp_path, tmp_path, {"router_aux_loss_coef": 0.1, "bias_update_rate": 0.001})
    with pytest.raises(RecipeError) as caught:
        checkpoint_family(base, settings)
    assert str(caught.value) == (
        "router.bias_update_rate: the routers of mixtral carry no correction bias that could be moved; got 0.001; "
        "write 0, and a router.router_aux_loss_coef to balance by a loss"
    )
