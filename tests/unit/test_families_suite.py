"""The same checks on every architecture of the table, each a tiny random model loaded from its on-disk layout.

Reference is transformers' own forward and stock PEFT's `target_parameters` on a dense twin that holds the values for
which the 4-bit weights stand. All in float32; gradients in training mode, from one seed (phimoe's router draws there).
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from finetune.checkpoint import fingerprint
from finetune.merge import merge
from finetune.methods.router_term import RouterTerm
from finetune.moe.audit import audit_model, differences, part_of
from finetune.moe.checkpointing import enable_checkpointing
from finetune.moe.families import FAMILIES, QUANTIZED_PARTS, Family, MoeLayout
from finetune.moe.nf4 import Nf4Stack
from finetune.moe.router import capture, find_routers
from tests.families import CONFIGS, save_tiny
from tests.unit.engine import IDS, base_model, dense_twin, logits, lora_settings, trained_model


MERGED = ("mixtral", "olmoe", "flex_olmo", "minimax")


@dataclass
class Specimen:
    """One architecture: its checkpoint, the 4-bit model with a trained adapter on all its parts, and the references."""

    family: Family
    moe: MoeLayout
    folder: Path
    model: Any
    adapter: Path
    twin: Any  # stock PEFT on the dense twin, with the saved adapter

    @property
    def targets(self) -> list[str]:
        return targets_of(self.family)


def targets_of(family: Family) -> list[str]:
    """Every part that the architecture has."""
    assert family.moe is not None
    optional = [("mlp", family.dense_mlp), ("shared_experts", family.moe.shared)]
    return ["attention", "experts", "router", *(name for name, modules in optional if modules)]


@pytest.fixture(scope="module", params=list(CONFIGS))
def specimen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Specimen:
    family = FAMILIES[request.param]
    assert family.moe is not None
    folder = save_tiny(request.param, tmp_path_factory.mktemp(request.param))
    model = trained_model(folder, targets=targets_of(family)).eval()
    adapter = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(str(adapter), save_embedding_layers=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = PeftModel.from_pretrained(dense_twin(model, folder), adapter, is_trainable=True)
    return Specimen(family, family.moe, folder, model, adapter, twin.eval())


def test_all_stacks_are_4_bit_and_routers_are_not(specimen: Specimen) -> None:
    base = specimen.model.get_base_model()
    layers = [
        layer for layer in base.model.layers if any(p.ndim == 3 for n, p in layer.named_parameters() if "experts" in n)
    ]
    stacks = [p for n, p in base.named_parameters() if isinstance(p.data, Nf4Stack)]
    assert len(layers) == 2
    assert len(stacks) == 2 * len(specimen.moe.stacks)
    parts = audit_model(specimen.model, specimen.family)
    settings = lora_settings(targets=specimen.targets)
    assert differences(parts, settings, load_in_4bit=True, dtype="float32") == []
    assert parts["experts"].as_dict()["adapted"] == len(stacks)
    assert set(parts["router"].weights.values()) == {"float32"}
    assert len(parts["router"].ranks) == 2
    for part in QUANTIZED_PARTS:
        assert set(parts[part].weights.values()) <= {"nf4"}


def test_every_linear_module_is_one_that_the_table_knows(specimen: Specimen) -> None:
    base = base_model(specimen.folder, load_in_4bit=False)
    linear = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
    unknown = [
        name
        for name in linear
        if part_of(name, specimen.family) == "other" and not specimen.family.leaves_unquantized(name)
    ]
    assert unknown == []
    stale = [
        module
        for module in (*specimen.family.dense_mlp, *specimen.moe.shared, *specimen.family.unquantized)
        if not any(f".{name}".endswith(f".{module}") for name in linear)
    ]
    assert stale == []


def test_the_forward_is_that_of_transformers_on_the_dequantised_weights(specimen: Specimen) -> None:
    with specimen.model.disable_adapter(), specimen.twin.disable_adapter():
        ours, theirs = logits(specimen.model), logits(specimen.twin)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_the_saved_adapter_in_stock_peft_gives_the_same_logits(specimen: Specimen) -> None:
    ours, theirs = logits(specimen.model), logits(specimen.twin)
    with specimen.model.disable_adapter():
        assert (ours - logits(specimen.model)).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-5)


def lora_gradients(model: Any, loss: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Gradient of each factor: of `loss`, or of the cross entropy in training mode."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if ".lora_" in n), strict=True)
    if loss is None:
        torch.manual_seed(0)
        loss = model.train()(IDS, labels=IDS, use_cache=False).loss
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    model.eval()
    return dict(zip(names, gradients, strict=True))


def test_every_factor_gets_the_gradient_that_stock_peft_gives_it(specimen: Specimen) -> None:
    ours, theirs = lora_gradients(specimen.model), lora_gradients(specimen.twin)
    assert set(ours) == set(theirs)
    for name, gradient in theirs.items():
        scale = gradient.abs().max()
        assert scale > 0, name
        assert (ours[name] - gradient).abs().max() <= 1e-4 * scale + 1e-7, name


def test_routers_are_found_captured_and_balanced(specimen: Specimen) -> None:
    term = RouterTerm(specimen.model, specimen.moe, 1.0)
    num_experts = term.balance.frequency_LE.shape[1]
    assert term.balance.frequency_LE.shape == (2, 8 if num_experts == 8 else 4)
    term.balance.begin_step(IDS.numel())
    with term.capture() as record:
        specimen.model(IDS, use_cache=False)
    with capture(find_routers(specimen.twin, specimen.moe.router_module)) as wanted, torch.no_grad():
        specimen.twin(IDS, use_cache=False)
    for ours, theirs in zip(record.logits, wanted.logits, strict=True):
        assert ours.shape == (IDS.numel(), num_experts)
        torch.testing.assert_close(ours.detach(), theirs, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(record.indices, wanted.indices, strict=True):
        assert ours.shape == (IDS.numel(), 2)
        assert torch.equal(ours.sort(-1).values, theirs.sort(-1).values)
    term.balance.frequency_LE = torch.arange(2.0 * num_experts).reshape(2, num_experts) / num_experts
    loss = term.balance.term(record, torch.ones(IDS.numel()))
    gradients = lora_gradients(specimen.model, loss)
    router = specimen.moe.router_parameter.removesuffix(".weight")
    reached = [name for name, gradient in gradients.items() if gradient.abs().max() > 0]
    assert sum(f".{router}." in name for name in reached) == 2 * 2
    assert any(f".{specimen.moe.experts_module}." in name for name in reached)


def test_merged_equals_base_plus_adapter(specimen: Specimen, tmp_path: Path) -> None:
    if specimen.family.model_type not in MERGED:
        pytest.skip("the merge of this layout is not there yet")
    record = {
        "base": {"name_or_path": str(specimen.folder), "fingerprint": fingerprint(specimen.folder)},
        "layout": {"expert_lora": "A:expert-major,B:rank-major"},
    }
    (specimen.adapter / "finetune.json").write_text(json.dumps(record))
    merge(specimen.adapter, tmp_path / "out", show_progress=False)
    load = specimen.family.transformers_class().from_pretrained
    merged = load(tmp_path / "out", dtype=torch.float32).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(load(specimen.folder, dtype=torch.float32), specimen.adapter).eval()
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-4, rtol=1e-4)


def test_checkpointing_changes_no_gradient(specimen: Specimen) -> None:
    """Last, as it leaves the model with checkpointing on."""
    plain = lora_gradients(specimen.model)
    enable_checkpointing(specimen.model)
    checkpointed = lora_gradients(specimen.model)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-7, rtol=1e-5)
