"""Adapters: fresh ones change nothing, trained ones are stock PEFT adapters, every target is met or refused."""

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from finetune.errors import RecipeError, WeightsError
from finetune.moe.lora import factor_stacks
from tests.bases import with_lora
from tests.support import save_tiny_mistral, save_tiny_mixtral
from tests.unit.engine import IDS, base_model, begin_dropout, dense_twin, logits, lora_settings, trained_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["fp32", "nf4"])
def test_a_fresh_adapter_leaves_the_base_exactly_as_it_is(base: Path, load_in_4bit: bool) -> None:
    model = base_model(base, load_in_4bit)
    before = logits(model)
    assert torch.equal(logits(with_lora(model, lora_settings())), before)


@pytest.mark.parametrize(
    "lora",
    [{}, {"expert_r": 2, "expert_lora_alpha": 1.0}, {"use_rslora": True}, {"targets": ["experts"]}],
    ids=["plain", "own rank for experts", "rslora", "experts alone"],
)
@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["fp32", "nf4"])
def test_the_saved_adapter_loads_in_stock_peft_with_equal_logits(
    base: Path, tmp_path: Path, load_in_4bit: bool, lora: dict[str, Any]
) -> None:
    model = trained_model(base, load_in_4bit, **lora).eval()
    model.save_pretrained(str(tmp_path))
    twin = dense_twin(model, base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = PeftModel.from_pretrained(twin, tmp_path)
    ours = logits(model)
    assert (ours - logits(base_model(base, load_in_4bit))).abs().max() > 0.1
    torch.testing.assert_close(ours, logits(stock), atol=1e-5, rtol=1e-5)


def test_disabling_the_adapter_gives_the_base(base: Path) -> None:
    model = trained_model(base)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base_model(base)))


def test_an_adapter_that_is_taken_off_leaves_the_base(base: Path) -> None:
    assert torch.equal(logits(trained_model(base).unload()), logits(base_model(base)))


def test_a_second_adapter_is_loaded_used_alone_and_beside_the_first(base: Path, tmp_path: Path) -> None:
    first, second = trained_model(base, seed=1), trained_model(base, seed=2)
    second.save_pretrained(str(tmp_path))
    alone, other = logits(first), logits(second)
    first.load_adapter(str(tmp_path), "second")
    assert torch.equal(logits(first), alone)
    first.set_adapter("second")
    assert torch.equal(logits(first), other)
    first.base_model.set_adapter(["default", "second"])
    twin = dense_twin(first, base)
    stock = PeftModel.from_pretrained(twin, tmp_path, "second")
    first.save_pretrained(str(tmp_path / "first"), selected_adapters=["default"])
    stock.load_adapter(str(tmp_path / "first"), "default")
    stock.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(first), logits(stock), atol=3e-5, rtol=1e-5)


def test_experts_that_would_get_no_gradient_are_refused(base: Path, tmp_path: Path) -> None:
    """An adapter whose wrappers are still PEFT's own: right in a forward, and never trained."""
    trained_model(base, load_in_4bit=False, targets=["experts"]).save_pretrained(str(tmp_path))
    model = trained_model(base, load_in_4bit=False, targets=["attention"])
    model.load_adapter(str(tmp_path), "second", is_trainable=True)
    model.base_model.set_adapter(["default", "second"])
    untrained = logits(model)
    with pytest.raises(WeightsError, match=r"^experts: gate_up_proj: would get no gradient: .*factor_stacks\(model\)"):
        model(IDS)
    factor_stacks(model)
    torch.testing.assert_close(logits(model), untrained, atol=1e-4, rtol=1e-4)
    model(IDS).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_a_copy_is_a_model_of_its_own(base: Path) -> None:
    model = trained_model(base)
    before, copy = logits(model), deepcopy(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.zeros_(parameter)
    assert torch.equal(logits(copy), before)
    assert not torch.equal(logits(model), before)


def test_every_factor_gets_a_gradient_and_nothing_else_does(base: Path) -> None:
    model = trained_model(base)
    logits_of_all = model(torch.arange(4, 84).reshape(2, 40)).logits
    logits_of_all.square().mean().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient == {name for name, _ in model.named_parameters() if ".lora_" in name}
    # attention 4, experts 2, router 1; two factors each; two layers
    assert len(with_gradient) == 2 * 2 * (4 + 2 + 1)


def test_a_layer_of_one_expert_trains_like_any_other(tmp_path: Path) -> None:
    model = trained_model(save_tiny_mixtral(tmp_path, num_local_experts=1, num_experts_per_tok=1), targets=["experts"])
    model(IDS).logits.square().mean().backward()
    with_gradient = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(with_gradient) == 2 * 2 * 2


def test_friendly_names_on_a_dense_model(tmp_path: Path) -> None:
    model = base_model(save_tiny_mistral(tmp_path))
    adapted = with_lora(model, lora_settings(targets=["attention", "mlp"]))
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 2 * (4 + 3)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "w7",
            "lora.targets: matches no module of this model; got w7; "
            "remove it, or use attention or experts or router, or a",
        ),
        ("mlp", "lora.targets: mixtral has no mlp; got mlp; remove it, or use attention or experts or router"),
        (
            "embed_tokens",
            "lora.targets: embeddings and head take no adapter; got embed_tokens; "
            "remove it, or use attention or experts",
        ),
    ],
)
def test_a_target_that_this_model_lacks_is_refused(base: Path, target: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        with_lora(base_model(base), lora_settings(targets=[target]))
    assert message in str(caught.value)


def test_experts_on_a_dense_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="mistral has no experts; got experts; remove it, or use attention or mlp"):
        with_lora(base_model(save_tiny_mistral(tmp_path)), lora_settings(targets=["experts"]))


def test_dropout_is_for_training_only(base: Path) -> None:
    """A model in evaluation answers as one without dropout; in training it does not."""
    dropping, plain = (trained_model(base, targets=["experts"], lora_dropout=p) for p in (0.5, 0.0))
    assert torch.equal(logits(dropping.eval()), logits(plain.eval()))
    begin_dropout(dropping)
    assert not torch.equal(logits(dropping.train()), logits(plain.train()))
