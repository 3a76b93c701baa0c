"""An adapter of chosen experts: smaller in memory, for stock PEFT and the merge an adapter like any other."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from finetune.base import checkpoint_family
from finetune.checkpoint import CheckpointReader
from finetune.errors import RecipeError, WeightsError
from finetune.merge import merge
from finetune.moe import experts as engine
from finetune.moe.audit import audit_model, differences
from finetune.moe.esft import keep_chosen
from finetune.moe.families import FAMILIES
from finetune.recipe import load_recipe
from tests.families import save_tiny
from tests.support import save_tiny_mistral, save_tiny_mixtral
from tests.unit.engine import IDS, dense_twin, logits, lora_settings, trained_model
from tests.unit.recipe_writing import changed

CHOSEN = {"model.layers.0": (1,), "model.layers.1": (0, 3)}
STACKS = ("gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("base"))


def chosen_model(base: Path, chosen: Mapping[str, tuple[int, ...]] = CHOSEN, **settings: Any) -> Any:
    """As `trained_model`, with the same factors for the chosen experts and none for the others."""
    model = trained_model(base, **settings)
    keep_chosen(model, chosen)
    return model


def full_model(base: Path, chosen: Mapping[str, tuple[int, ...]] = CHOSEN, **settings: Any) -> Any:
    """The adapter of all experts, those that were not chosen with factors of zero."""
    model = trained_model(base, **settings)
    for name, factor in model.named_parameters():
        if ".experts." in name and ".lora_" in name:
            view = by_expert(name, factor.data)
            for expert in set(range(4)) - set(experts_of(name, chosen)):
                view[expert] = 0
    return model


def experts_of(name: str, chosen: Mapping[str, tuple[int, ...]] = CHOSEN) -> tuple[int, ...]:
    return next(experts for layer, experts in chosen.items() if f"{layer}." in name)


def by_expert(name: str, factor: torch.Tensor, experts: int = 4) -> torch.Tensor:
    """`[E, ...]`: A is expert-major, B rank-major."""
    if "lora_A" in name:
        return factor.view(experts, -1, factor.shape[1])
    return factor.view(factor.shape[0], -1, experts).permute(2, 0, 1)


def test_only_the_chosen_experts_have_factors_and_optimizer_state(base: Path) -> None:
    model = chosen_model(base)
    one_expert = 4 * ((64 + 192) + (96 + 64))
    assert audit_model(model, FAMILIES["mixtral"])["experts"].trained == 3 * one_expert
    assert differences(audit_model(model, FAMILIES["mixtral"]), lora_settings(), True, "float32") == []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(IDS).logits.square().mean().backward()
    optimizer.step()
    held = sum(state[name].numel() for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    all_experts = trained_model(base)
    assert held == 2 * (sum(p.numel() for p in all_experts.parameters() if p.requires_grad) - 5 * one_expert)


@pytest.mark.parametrize(
    ("load_in_4bit", "grouped"), [(False, False), (True, False), (True, True)], ids=["fp32", "nf4", "grouped products"]
)
def test_logits_and_gradients_are_those_of_the_full_adapter(
    base: Path, load_in_4bit: bool, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_grouped_products", lambda _: grouped)
    ours, full = chosen_model(base, load_in_4bit=load_in_4bit), full_model(base, load_in_4bit=load_in_4bit)
    for model in (ours, full):
        model(IDS).logits.square().mean().backward()
    torch.testing.assert_close(logits(ours), logits(full), atol=1e-5, rtol=1e-5)
    wanted = dict(full.named_parameters())
    compared = 0
    for name, parameter in ours.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient, full_gradient = parameter.grad, wanted[name].grad
        if ".experts." in name:
            experts = experts_of(name)
            gradient, full_gradient = by_expert(name, gradient, len(experts)), by_expert(name, full_gradient)
            full_gradient = full_gradient[list(experts)]
        torch.testing.assert_close(gradient, full_gradient, atol=1e-6, rtol=1e-4, msg=name)
        compared += 1
    assert compared == 2 * 2 * (4 + 2 + 1)


def test_a_layer_whose_chosen_experts_get_no_token_still_has_gradients(base: Path) -> None:
    """Zeros, not none: with several processes each waits for every gradient of every other."""
    model = chosen_model(base, {"model.layers.0": (2,), "model.layers.1": (0, 3)})
    layer = model.get_base_model().model.layers[0].mlp
    layer.gate.get_base_layer().weight.data[2] = 0
    layer.gate.get_base_layer().register_forward_hook(
        lambda _module, _args, output: (output[0], output[1], torch.tensor([0, 3]).expand_as(output[2]))
    )
    model(IDS).logits.square().mean().backward()
    of_layer = {n: p.grad for n, p in model.named_parameters() if "layers.0.mlp.experts" in n and p.requires_grad}
    assert len(of_layer) == 4
    assert all(gradient is not None and not gradient.any() for gradient in of_layer.values())


@pytest.mark.parametrize("lora", [{}, {"expert_r": 2, "use_rslora": True}], ids=["plain", "own rank, rslora"])
def test_on_disk_it_is_the_full_adapter_with_zeros(base: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    model, full = chosen_model(base, **lora), full_model(base, **lora)
    model.save_pretrained(str(tmp_path))
    saved, wanted = load_file(tmp_path / "adapter_model.safetensors"), get_peft_model_state_dict(full)
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in saved.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = PeftModel.from_pretrained(dense_twin(model, base), tmp_path)
    torch.testing.assert_close(logits(model.eval()), logits(stock), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss", "granitemoe"])
def test_stacks_of_another_layout_are_cut_down_alike(tmp_path: Path, model_type: str) -> None:
    """Dense first layers and shared experts; transposed stacks with biases; fused stacks on disk."""
    folder = save_tiny(model_type, tmp_path / "base")
    model = trained_model(folder, targets=["experts"])
    moe = FAMILIES[model_type].moe
    assert moe is not None
    names = [name for name, _ in model.get_base_model().named_modules() if name.endswith(f".{moe.experts_module}")]
    keep_chosen(model, {name.removesuffix(f".{moe.experts_module}"): (1, 3) for name in names})
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 2 * 2 * len(names)
    for name, factor in saved.items():
        experts = by_expert(name, factor, factor.shape[1 if "lora_B" in name else 0] // 4)
        assert experts.abs().sum((1, 2)).nonzero().flatten().tolist() == [1, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = PeftModel.from_pretrained(dense_twin(model, folder), tmp_path / "adapter")
    torch.testing.assert_close(logits(model.eval()), logits(stock.eval()), atol=5e-5, rtol=1e-5)


def test_a_saved_adapter_is_loaded_again_and_another_one_refused(base: Path, tmp_path: Path) -> None:
    saved, loaded = chosen_model(base), chosen_model(base, seed=1)
    saved.save_pretrained(str(tmp_path / "same"))
    loaded.load_adapter(str(tmp_path / "same"), "default", is_trainable=True)
    assert torch.equal(logits(loaded), logits(saved))
    other = chosen_model(base, {"model.layers.0": (1,), "model.layers.1": (0, 2)})
    other.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(WeightsError) as caught:
        loaded.load_adapter(str(tmp_path / "other"), "default", is_trainable=True)
    assert "layers.1.mlp.experts" in str(caught.value)
    assert str(caught.value).endswith(
        "the adapter changes experts that this run does not adapt; "
        "continue the run with the experts.json that it was made with, or start anew in another output_dir"
    )


def test_all_experts_chosen_is_the_adapter_as_it_was(base: Path) -> None:
    everything = {"model.layers.0": (0, 1, 2, 3), "model.layers.1": (0, 1, 2, 3)}
    ours, full = chosen_model(base, everything), trained_model(base)
    assert torch.equal(logits(ours), logits(full))
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in full.named_parameters()}


def test_the_merge_changes_the_chosen_experts_only(base: Path, tmp_path: Path) -> None:
    model = chosen_model(base, load_in_4bit=False)
    model.save_pretrained(str(tmp_path / "adapter"))
    report = merge(tmp_path / "adapter", tmp_path / "merged", base=base, show_progress=False)
    before, after = CheckpointReader(base), CheckpointReader(tmp_path / "merged")
    experts = [key for key in before.keys if ".experts." in key]
    differing = {key for key in experts if not torch.equal(before.read(key), after.read(key))}
    assert differing == {key for key in experts if int(key.split(".experts.")[1][0]) in experts_of(key)}
    assert report.logits.merged_error_max < 1e-4


@pytest.mark.parametrize(
    ("chosen", "line"),
    [
        (
            {"model.layers.0": (1,), "model.layers.1": (0, 4)},
            "model.layers.1.mlp.experts: the choice of experts was made for another model; "
            "got experts of model.layers.0, model.layers.1; "
            "start anew in another output_dir, so that the experts are measured on this model",
        ),
        ({"model.layers.0": (1,)}, "model.layers.1.mlp.experts: the choice of experts was made for another model"),
        (
            {**CHOSEN, "model.layers.2": (1,)},
            "model.layers.2: the choice of experts was made for another model; got no adapted experts there",
        ),
    ],
    ids=["an expert too many", "a layer too few", "a layer too many"],
)
def test_a_choice_made_for_another_model_is_refused(
    base: Path, chosen: Mapping[str, tuple[int, ...]], line: str
) -> None:
    with pytest.raises(WeightsError) as caught:
        chosen_model(base, chosen)
    assert str(caught.value).startswith(line)


def test_a_dense_model_has_no_experts_to_choose(tmp_path: Path) -> None:
    auto = "  r: 8\n  experts: auto\n  experts_share: 0.5"
    (tmp_path / "recipe.yaml").write_text(changed(("  r: 8", auto), ("router:\n  router_aux_loss_coef: 0.02\n", "")))
    dense = save_tiny_mistral(tmp_path / "model")
    with pytest.raises(RecipeError, match="section is missing"):
        load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text(changed(("  r: 8", auto)))
    with pytest.raises(RecipeError, match="router: mistral is a dense model without a router; remove the router sect"):
        checkpoint_family(dense, load_recipe(tmp_path / "recipe.yaml"))
