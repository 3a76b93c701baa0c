"""The same checks on every architecture of the table, each a tiny random model loaded from its on-disk layout.

Reference is transformers' own forward and stock PEFT's `target_parameters` on a dense twin that holds the values for
which the 4-bit weights stand. All in float32; gradients in training mode, from one seed (phimoe's router draws there).
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from finetune.adapters.adapter import read_adapter
from finetune.adapters.deltas import plan
from finetune.checkpoint import CheckpointReader
from finetune.data import Collator
from finetune.methods.router_term import RouterTerm
from finetune.moe.audit import audit_model, differences, part_of
from finetune.moe.checkpointing import enable_checkpointing
from finetune.moe.families import FAMILIES, QUANTIZED_PARTS, Family, MoeLayout
from finetune.moe.nf4 import Nf4Stack
from finetune.moe.router import RouterRecord, capture, find_routers
from finetune.recipe import RouterSettings
from finetune.upstream import clean_name
from tests.families import CONFIGS, save_tiny
from tests.support import tiny_tokenizer
from tests.unit.engine import IDS, dense_twin, logits, lora_settings, trained_model


@dataclass
class Specimen:
    """One architecture: its checkpoint, the 4-bit model with a trained adapter on all its parts, and the references."""

    family: Family
    moe: MoeLayout
    folder: Path
    model: Any
    adapter: Path
    twin: Any  # stock PEFT on the dense twin, with the saved adapter


@pytest.fixture(scope="module", params=list(CONFIGS))
def specimen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Specimen:
    family = FAMILIES[request.param]
    assert family.moe is not None
    folder = save_tiny(request.param, tmp_path_factory.mktemp(request.param))
    model = trained_model(folder, targets=list(family.targets)).eval()
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
    settings = lora_settings(targets=list(specimen.family.targets))
    assert differences(parts, settings, load_in_4bit=True, dtype="float32") == []
    assert parts["experts"].as_dict()["adapted"] == len(stacks)
    assert set(parts["router"].weights.values()) == {"float32"}
    assert len(parts["router"].ranks) == 2
    for part in QUANTIZED_PARTS:
        assert set(parts[part].weights.values()) <= {"nf4"}


def test_every_linear_module_is_one_that_the_table_knows(specimen: Specimen) -> None:
    modules = specimen.twin.named_modules()
    linear = [clean_name(f"{n}.weight") for n, m in modules if isinstance(m, torch.nn.Linear) and ".lora_" not in n]
    family = specimen.family
    assert [n for n in linear if part_of(n, family) == "other" and not family.leaves_unquantized(n)] == []
    named = (*family.dense_mlp, *specimen.moe.shared, *family.unquantized)
    assert [module for module in named if not any(n.endswith(f".{module}.weight") for n in linear)] == []


def test_the_table_says_which_attention_code_there_is(specimen: Specimen) -> None:
    assert specimen.twin.get_base_model()._supports_sdpa == ("sdpa" in specimen.family.attn_implementations)


def test_rows_packed_into_one_sequence_are_kept_apart_or_refused(specimen: Specimen) -> None:
    ids, cut = IDS[:1], 15
    model = specimen.model.eval()
    position_ids = torch.cat([torch.arange(cut), torch.arange(ids.shape[1] - cut)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=position_ids, use_cache=False).logits
        apart = torch.cat([model(part, use_cache=False).logits for part in (ids[:, :cut], ids[:, cut:])], dim=1)
    assert bool((packed - apart).abs().max() < 1e-4) == (specimen.family.unpackable is None)


def test_padding_changes_no_row(specimen: Specimen) -> None:
    row, mask = IDS[:1, :15], torch.ones(1, 25, dtype=torch.long)
    padded, mask[:, 15:] = torch.cat([row, torch.full((1, 10), 3)], dim=1), 0
    with torch.no_grad():
        alone = specimen.model.eval()(row, use_cache=False).logits
        beside_padding = specimen.model(padded, attention_mask=mask, use_cache=False).logits[:, :15]
    torch.testing.assert_close(beside_padding, alone, atol=5e-5, rtol=1e-5)


def test_the_forward_is_that_of_transformers_on_the_dequantised_weights(specimen: Specimen) -> None:
    with specimen.model.disable_adapter(), specimen.twin.disable_adapter():
        ours, theirs = logits(specimen.model.eval()), logits(specimen.twin.eval())
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_the_saved_adapter_in_stock_peft_gives_the_same_logits(specimen: Specimen) -> None:
    ours, theirs = logits(specimen.model.eval()), logits(specimen.twin.eval())
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


def losses(specimen: Specimen) -> tuple[torch.Tensor, torch.Tensor, RouterRecord]:
    """Cross entropy and balance term of one forward in training mode; and what the term, not uniform, is from."""
    term = RouterTerm(specimen.model, specimen.family, RouterSettings(router_aux_loss_coef=1.0))
    num_experts = term.balance.frequency_LE.shape[1]
    term.begin_step(torch.tensor(IDS.numel()), logged=False)
    term.balance.frequency_LE = torch.arange(2.0 * num_experts).reshape(2, num_experts) / num_experts
    torch.manual_seed(0)
    with term.capture() as record:
        ce = specimen.model.train()(IDS, labels=IDS, use_cache=False).loss
    return ce, term.add(torch.zeros(()), record, torch.ones(IDS.numel()), ranks=1), record


def test_routers_are_found_captured_and_balanced(specimen: Specimen) -> None:
    _, loss, record = losses(specimen)
    torch.manual_seed(0)
    with capture(find_routers(specimen.twin, specimen.moe.router_module)) as wanted, torch.no_grad():
        specimen.twin.train()(IDS, use_cache=False)
    assert len(record.logits) == len(wanted.logits) == 2
    for ours, theirs in zip(record.logits, wanted.logits, strict=True):
        assert ours.shape == (IDS.numel(), 8 if "n_routed_experts" in CONFIGS[specimen.family.model_type] else 4)
        torch.testing.assert_close(ours.detach(), theirs, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(record.indices, wanted.indices, strict=True):
        assert torch.equal(ours.sort(-1).values, theirs.sort(-1).values)
    reached = [name for name, gradient in lora_gradients(specimen.model, loss).items() if gradient.abs().max() > 0]
    router = specimen.moe.router_parameter.removesuffix(".weight")
    assert sum(f".{router}." in name for name in reached) == 2 * 2
    assert any(f".{specimen.moe.experts_module}." in name for name in reached)


def test_a_micro_batch_without_rows_uses_every_factor_and_changes_nothing(specimen: Specimen) -> None:
    """DDP waits for the gradient of every trained parameter."""
    batch = Collator(tiny_tokenizer())([])
    term = RouterTerm(specimen.model, specimen.family, RouterSettings(router_aux_loss_coef=1.0, scope="micro_batch"))
    term.begin_step(torch.zeros(()), logged=False)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with term.capture() as record:
        hidden = specimen.model.train().get_base_model().model(**inputs, use_cache=False).last_hidden_state
    loss = term.add(hidden[:, :-1].sum(), record, batch["weight"].reshape(-1), ranks=1)
    factors = {name: p for name, p in specimen.model.named_parameters() if ".lora_" in name}
    gradients = torch.autograd.grad(loss, list(factors.values()), allow_unused=True)
    for name, gradient in zip(factors, gradients, strict=True):
        assert gradient is not None, name
        assert gradient.count_nonzero() == 0, name
    assert loss == 0
    term.end_step(lambda sums: sums)
    assert term.figures()[0]["router/dead_experts"] == sum(router.num_experts for router in term.routers)


def test_the_merge_finds_a_place_on_disk_for_every_factor(specimen: Specimen) -> None:
    """That it puts the right values there is shown for the same targets in `test_merge_families.py`."""
    adapter = read_adapter(specimen.adapter)
    planned = plan(CheckpointReader(specimen.folder), adapter, specimen.family)
    deltas = [delta for each in planned.values() for delta in each]
    assert {delta.path for delta in deltas} == set(adapter.pairs)
    assert {delta.part for delta in deltas} == set(specimen.family.targets)


def test_checkpointing_changes_no_gradient(specimen: Specimen) -> None:
    results = []
    for mode in ("none", "selective", "full"):
        enable_checkpointing(specimen.model, mode)
        ce, balance, _ = losses(specimen)
        results.append(lora_gradients(specimen.model, ce + balance))
    enable_checkpointing(specimen.model, "none")
    for recomputed in results[1:]:
        for name, gradient in results[0].items():
            torch.testing.assert_close(recomputed[name], gradient, atol=1e-7, rtol=1e-5)
