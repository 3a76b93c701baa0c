"""Correction biases that training moved: not lost in 16 bits, saved beside the adapter, merged, refused where unfit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import WeightsError
from finetune.merge import merge
from finetune.moe.families import FAMILIES, MoeLayout
from finetune.moe.router_bias import BIAS_FILE, BiasBalance, find_biases, load_biases
from tests.families import save_tiny, tiny_model
from tests.unit.merge_adapters import load, logits, save_adapter

BIASED = [name for name, family in FAMILIES.items() if family.moe is not None and family.moe.correction_bias]


def layout(model_type: str) -> MoeLayout:
    moe = FAMILIES[model_type].moe
    assert moe is not None
    return moe


def moved_adapter(model_type: str, base: Path, folder: Path) -> Path:
    """An adapter on attention and, beside it, biases far enough from the base's to choose other experts."""
    save_adapter(base, folder, r=4, lora_alpha=8, target_modules=list(FAMILIES[model_type].attention))
    model = load(base)
    with torch.no_grad():
        for bias in find_biases(model, layout(model_type)).values():
            bias.add_(torch.randn_like(bias))
    biases = {name: bias.detach().clone() for name, bias in find_biases(model, layout(model_type)).items()}
    save_file(biases, folder / BIAS_FILE)
    record = json.loads((folder / "finetune.json").read_text())
    (folder / "finetune.json").write_text(json.dumps({**record, "router_bias": BIAS_FILE}))
    return folder


@pytest.mark.parametrize("model_type", BIASED)
def test_a_merged_model_has_the_moved_biases_and_the_adapter(model_type: str, tmp_path: Path) -> None:
    base = save_tiny(model_type, tmp_path / "base", dtype="bfloat16")
    adapter = moved_adapter(model_type, base, tmp_path / "adapter")
    report = merge(adapter, tmp_path / "merged", dtype="float32", show_progress=False)
    adapted = load(base, adapter)
    without = logits(adapted)
    load_biases(adapted, layout(model_type), adapter)
    wanted = logits(adapted)
    assert (wanted - without).abs().max() > 0.01, "the biases matter"
    torch.testing.assert_close(logits(load(tmp_path / "merged")), wanted, atol=1e-4, rtol=1e-4)
    assert report.proof.changed == report.targeted


def test_a_small_step_on_a_large_bias_is_not_lost_in_a_16_bit_model() -> None:
    """MiniMax-M2's biases are not among the tensors that transformers keeps in float32."""
    model = tiny_model("minimax_m2").to(torch.bfloat16)
    for buffer in find_biases(model, layout("minimax_m2")).values():
        buffer.fill_(8.0)
    bias = BiasBalance(model, FAMILIES["minimax_m2"], 0.001)
    bias.end_step(torch.tensor([[3.0, 1.0, 0.0, 0.0]] * 2))
    for each in find_biases(model, layout("minimax_m2")).values():
        assert each.tolist() == pytest.approx([7.999, 8.0, 8.001, 8.001], abs=1e-6)
    with torch.no_grad():
        assert model(torch.arange(4, 44)[None], use_cache=False).logits.isfinite().all()


def test_biases_move_in_the_model_also_after_it_was_moved_itself() -> None:
    """A launcher's `model.to(device)` leaves other tensors in the place of buffers."""
    model = tiny_model("deepseek_v3")
    bias = BiasBalance(model, FAMILIES["deepseek_v3"], 0.5)
    before = [buffer.clone() for buffer in bias.biases.values()]
    model.to(torch.float64).to(torch.float32)
    bias.end_step(torch.tensor([[1.0, 0.0]] * 2).repeat(1, 4))
    for buffer, old in zip(find_biases(model, layout("deepseek_v3")).values(), before, strict=True):
        assert (buffer - old).tolist() == pytest.approx([-0.5, 0.5] * 4)


def test_biases_are_read_back_as_they_were_saved_also_under_an_adapter(tmp_path: Path) -> None:
    base = save_tiny("ernie4_5_moe", tmp_path / "base")
    adapter = moved_adapter("ernie4_5_moe", base, tmp_path / "adapter")
    by_hand, bare, adapted = load(base), load(base), load(base, adapter)
    by_hand.load_state_dict(load_file(adapter / BIAS_FILE), strict=False)  # as the README says
    load_biases(bare, layout("ernie4_5_moe"), adapter)
    load_biases(adapted, layout("ernie4_5_moe"), adapter)
    for model in (by_hand, bare, adapted):
        found = find_biases(model, layout("ernie4_5_moe"))
        assert found.keys() == load_file(adapter / BIAS_FILE).keys()
        assert all(torch.equal(found[name], values) for name, values in load_file(adapter / BIAS_FILE).items())


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return moved_adapter("deepseek_v3", save_tiny("deepseek_v3", tmp_path / "base"), tmp_path / "adapter")


def test_a_record_of_biases_without_their_file_is_refused(adapter: Path) -> None:
    (adapter / BIAS_FILE).unlink()
    with pytest.raises(WeightsError) as caught:
        merge(adapter, adapter.parent / "merged", show_progress=False)
    assert str(caught.value) == (
        f"{adapter / BIAS_FILE}: is missing, and the record names it: the correction biases of the routers that "
        "training moved; copy the whole adapter folder of the run"
    )
    assert not (adapter.parent / "merged").exists()


def test_biases_of_another_model_are_not_copied(adapter: Path) -> None:
    model = tiny_model("glm4_moe", num_hidden_layers=2)
    before = {name: bias.clone() for name, bias in find_biases(model, layout("glm4_moe")).items()}
    with pytest.raises(
        WeightsError, match=r"these correction biases are not this model's; got model.layers.2.mlp.gate"
    ):
        load_biases(model, layout("glm4_moe"), adapter)
    assert all(torch.equal(before[name], bias) for name, bias in find_biases(model, layout("glm4_moe")).items())
