"""What a base may look like, and what is refused by name before anything is written."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune.adapters.deltas
import finetune.merge
import finetune.merge.job
from finetune.errors import WeightsError
from finetune.merge import merge
from finetune.merge.stream import stream_merged
from finetune.upstream import clean_name
from tests.families import save_tiny
from tests.unit.merge_adapters import adapter_on_all, load, logits, tensors

Tensors = dict[str, torch.Tensor]
EXPERTS = "model.layers.1.mlp.experts"


def respell(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change the tensors of a base or adapter folder."""
    (file,) = folder.glob("*model.safetensors")
    save_file({key: value.clone() for key, value in change(load_file(file)).items()}, file, metadata={"format": "pt"})


def refused(adapter: Path, message: str, base: Path | None = None) -> None:
    before = sorted(adapter.parent.iterdir())
    with pytest.raises(WeightsError, match=message):
        merge(adapter, adapter.parent / "out", base=base, show_progress=False)
    assert sorted(adapter.parent.iterdir()) == before


@pytest.mark.parametrize("model_type", ["deepseek_v3", "phimoe", "granitemoe"])
def test_a_base_that_holds_its_experts_as_the_loaded_model_does(model_type: str, tmp_path: Path) -> None:
    published = save_tiny(model_type, tmp_path / "published")
    base = save_tiny(model_type, tmp_path / "base")
    load(published).save_pretrained(base, save_original_format=False)
    assert tensors(base).keys() != tensors(published).keys()
    adapter = adapter_on_all(base, tmp_path / "adapter")
    merge(adapter, tmp_path / "merged", show_progress=False)
    assert tensors(tmp_path / "merged").keys() == tensors(base).keys()
    assert (logits(load(tmp_path / "merged")) - logits(load(base, adapter))).abs().max() < 1e-4


def test_layers_that_the_architecture_does_not_load_are_copied(tmp_path: Path) -> None:
    """Published checkpoints hold a layer more, for multi-token prediction, with experts of its own."""
    base = save_tiny("deepseek_v3", tmp_path / "base")
    last = "model.layers.2."
    respell(base, lambda t: t | {k.replace(last, "model.layers.61."): v for k, v in t.items() if k.startswith(last)})
    merge(adapter_on_all(base, tmp_path / "adapter"), tmp_path / "merged", show_progress=False)
    plain, merged = tensors(base), tensors(tmp_path / "merged")
    spare = [key for key in plain if key.startswith("model.layers.61.")]
    assert len(spare) > 20
    assert all(torch.equal(plain[key], merged[key]) for key in spare)


@pytest.mark.parametrize(
    ("model_type", "absent", "message"),
    [
        (
            "mixtral",
            ["model.layers.1.block_sparse_moe.experts.3.w2.weight"],
            r"layers.1.block_sparse_moe.experts.3.w2.weight: the checkpoint has no such tensor; .* complete checkpoint",
        ),
        (
            "mixtral",
            [f"model.layers.0.block_sparse_moe.experts.3.w{number}.weight" for number in (1, 2, 3)],
            r"layers.0.block_sparse_moe.experts.3.w1.weight: the checkpoint has no such tensor",
        ),
        (
            "granitemoe",
            ["model.layers.0.block_sparse_moe.output_linear.weight"],
            "missing_keys; got model.layers.0.block_sparse_moe.experts.down_proj; give a complete",
        ),
        (
            "gpt_oss",
            ["model.layers.1.mlp.experts.down_proj"],
            "missing_keys; got model.layers.1.mlp.experts.down_proj; give a complete",
        ),
    ],
    ids=["one matrix", "an expert", "a stack", "a transposed stack"],
)
def test_a_base_with_a_missing_expert(model_type: str, absent: list[str], message: str, tmp_path: Path) -> None:
    base = save_tiny(model_type, tmp_path / "base")
    adapter = adapter_on_all(base, tmp_path / "adapter")
    (adapter / "finetune.json").unlink()  # the fingerprint would tell, too
    respell(base, lambda t: {key: value for key, value in t.items() if key not in absent})
    refused(adapter, message, base=base)


def test_a_base_with_an_odd_expert(tmp_path: Path) -> None:
    base = save_tiny("qwen3_moe", tmp_path / "base")
    adapter = adapter_on_all(base, tmp_path / "adapter")
    (adapter / "finetune.json").unlink()
    key = f"{EXPERTS}.2.up_proj.weight"
    respell(base, lambda t: t | {key: t[key][:-1]})
    refused(adapter, rf"{key}: .*\[31, 64\]", base=base)


def test_an_adapter_for_another_number_of_experts(tmp_path: Path) -> None:
    trained_on = save_tiny("gpt_oss", tmp_path / "trained_on", num_local_experts=8)
    base = save_tiny("gpt_oss", tmp_path / "base")
    adapter = adapter_on_all(trained_on, tmp_path / "adapter")
    (adapter / "finetune.json").unlink()
    message = (
        r"mlp.experts: shape or rank does not fit; got A \[24, 96\] and B \[64, 24\]; .* r=3 and the base of 4 expe"
    )
    refused(adapter, message, base=base)


def test_an_adapter_for_stacks_that_are_not_transposed(tmp_path: Path) -> None:
    base = save_tiny("gpt_oss", tmp_path / "base")
    adapter = adapter_on_all(base, tmp_path / "adapter")
    stack = f"base_model.model.{EXPERTS}"
    respell(
        adapter,
        lambda t: t | {f"{stack}.lora_A.weight": torch.zeros(12, 64), f"{stack}.lora_B.weight": torch.zeros(96, 12)},
    )
    refused(adapter, r"mlp.experts: made for another layout: input and output are swapped; got A \[12, 64\]")


# The proof must be able to fail on stacks in one tensor, too.


@pytest.fixture(scope="module", params=["granitemoe", "gpt_oss"])
def fused(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on a base whose stacks lie in one tensor each."""
    folder = tmp_path_factory.mktemp(request.param)
    return adapter_on_all(save_tiny(request.param, folder / "base"), folder / "adapter")


def test_the_logits_refuse_a_confused_order_of_experts(fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def expert_major(B_nR: torch.Tensor, experts: int) -> torch.Tensor:
        return B_nR.reshape(B_nR.shape[0], experts, -1).transpose(0, 1)

    monkeypatch.setattr(finetune.adapters.deltas, "by_expert", expert_major)
    refused(fused, r"merged model differs from base \+ adapter")


def test_the_count_refuses_an_expert_left_out(fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(*args: Any) -> Any:
        log = stream_merged(*args)
        key = next(key for key, result in log.results.items() if result.part == "experts")
        used = tuple(use for use in log.results[key].used if use[2] != 2)
        log.results[key] = replace(log.results[key], used=used)
        return log

    monkeypatch.setattr(finetune.merge, "stream_merged", forgetful)
    refused(fused, r"experts(.base_layer)?: adapter tensor was not used exactly once; got expert 2 of 4")


# Correction biases: an adapter cannot carry them, they lie beside it.


def with_moved_bias(adapter: Path, base: Path, names: dict[str, str], shift: float = 0.5) -> Tensors:
    """Write moved biases beside the adapter; `names` on disk -> in the loaded model. Returns them by name on disk."""
    plain = tensors(base)
    steps = {key: shift * (torch.arange(plain[key].numel()) % 2 * 2.0 - 1).view_as(plain[key]) for key in names}
    moved = {key: plain[key].float() + steps[key] for key in names}
    save_file({names[key]: value for key, value in moved.items()}, adapter / "router_bias.safetensors")
    return moved


@pytest.mark.parametrize(
    ("model_type", "on_disk", "loaded"),
    [
        ("deepseek_v3", "mlp.gate.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),
        ("minimax_m2", "block_sparse_moe.e_score_correction_bias", "mlp.e_score_correction_bias"),
        ("ernie4_5_moe", "mlp.moe_statics.e_score_correction_bias", "mlp.gate.moe_statics.e_score_correction_bias"),
    ],
)
def test_moved_correction_biases_replace_the_bases(model_type: str, on_disk: str, loaded: str, tmp_path: Path) -> None:
    base = save_tiny(model_type, tmp_path / "base")
    adapter = adapter_on_all(base, tmp_path / "adapter")
    keys = {key: key.replace(on_disk, loaded) for key in tensors(base) if key.endswith(on_disk)}
    moved = with_moved_bias(adapter, base, keys)
    report = merge(adapter, tmp_path / "merged", show_progress=False)
    merged = tensors(tmp_path / "merged")
    assert len(moved) == 2
    assert all(torch.equal(merged[key], value) for key, value in moved.items())
    assert report.proof.changed == report.targeted
    assert re.search("router biases +2 tensors, as training left them", report.table())
    whole = load(base, adapter)
    state = {clean_name(name): value for name, value in whole.state_dict().items()}
    for key, name in keys.items():
        state[name].copy_(moved[key])
    assert (logits(load(tmp_path / "merged")) - logits(whole)).abs().max() < 1e-4


@pytest.mark.parametrize("moving", [True, False])
def test_correction_biases_stay_in_32_bits(moving: bool, tmp_path: Path) -> None:
    base = save_tiny("deepseek_v3", tmp_path / "base", dtype="bfloat16" if moving else "float32")
    adapter = adapter_on_all(base, tmp_path / "adapter", b_std=0.3)
    keys = [key for key in tensors(base) if key.endswith("e_score_correction_bias")]
    if moving:
        with_moved_bias(adapter, base, {key: key for key in keys})
    report = merge(adapter, tmp_path / "merged", dtype="bfloat16", show_progress=False)
    assert report.dtypes == ("BF16", "F32")
    assert {key for key, value in tensors(tmp_path / "merged").items() if value.dtype == torch.float32} == set(keys)


def test_correction_biases_of_another_model(tmp_path: Path) -> None:
    base = save_tiny("glm4_moe", tmp_path / "base")
    adapter = adapter_on_all(base, tmp_path / "adapter")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    save_file({name: torch.zeros(5)}, adapter / "router_bias.safetensors")
    refused(adapter, rf"router_bias.safetensors: these correction biases are not this base's; got {name} \[5\]; merge")


def test_what_the_proof_measures_counts_the_moved_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_tiny("deepseek_v3", tmp_path / "base")
    adapter = adapter_on_all(base, tmp_path / "adapter")
    keys = [key for key in tensors(base) if key.endswith("e_score_correction_bias")]
    with_moved_bias(adapter, base, {key: key for key in keys})
    monkeypatch.setattr(finetune.merge.job, "fixed_tensors", lambda *_: {})
    refused(adapter, r"merged model differs from base \+ adapter")
