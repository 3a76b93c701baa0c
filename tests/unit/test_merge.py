"""Merged = base + adapter, for every kind of adapter that the trainer writes; and the proof can fail."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import finetune.adapters.adapter
import finetune.adapters.deltas
import finetune.merge.job
from finetune.adapters.deltas import Delta
from finetune.errors import WeightsError
from finetune.merge import merge, proof, stream
from finetune.merge.stream import stream_merged
from tests.support import save_tiny_mistral, save_tiny_mixtral
from tests.unit.merge_adapters import EVERYTHING, EXPERTS, ROUTER, load, logits, save_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.mark.parametrize(
    "lora",
    [
        EVERYTHING,
        {**EVERYTHING, "use_rslora": True, "lora_alpha": 3},
        {**EVERYTHING, "rank_pattern": dict.fromkeys(EXPERTS, 2), "alpha_pattern": {EXPERTS[1]: 5}},
        {**EVERYTHING, "target_parameters": [EXPERTS[1]]},
        {"r": 3, "lora_alpha": 3, "target_parameters": [EXPERTS[0], ROUTER]},
        {"r": 2, "lora_alpha": 4, "target_modules": ["layers.1.self_attn.q_proj", "lm_head"]},
    ],
    ids=["everything", "rslora", "expert rank", "down_proj only", "stack and router only", "one layer and head"],
)
def test_merged_equals_base_plus_adapter(base: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    folder = save_adapter(base, tmp_path / "adapter", **lora)
    report = merge(folder, tmp_path / "out", show_progress=False)
    adapted = logits(load(base, folder))
    assert (adapted - logits(load(base))).abs().max() > 0.1
    assert (logits(load(tmp_path / "out")) - adapted).abs().max() < 1e-4
    assert report.logits.merged_error_max <= 1e-4
    assert report.proof.changed == report.targeted > 0


@pytest.mark.parametrize("lora", [{"target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]}])
def test_a_dense_model_is_the_easy_case_of_the_same_path(tmp_path: Path, lora: dict[str, Any]) -> None:
    base = save_tiny_mistral(tmp_path / "base")
    folder = save_adapter(base, tmp_path / "adapter", r=4, lora_alpha=8, **lora)
    report = merge(folder, tmp_path / "out", show_progress=False)
    assert (logits(load(tmp_path / "out")) - logits(load(base, folder))).abs().max() < 1e-4
    assert set(report.parts) == {"attention", "mlp"}
    assert report.proof.changed == 2 * 5


def test_a_16_bit_base_gives_a_16_bit_model_that_is_rounded_once(tmp_path: Path) -> None:
    base = save_tiny_mixtral(tmp_path / "base", dtype="bfloat16")
    folder = save_adapter(base, tmp_path / "adapter", b_std=0.3)
    report = merge(folder, tmp_path / "out", show_progress=False)
    stock = load(base, folder).merge_and_unload().state_dict()
    merged = load(tmp_path / "out").state_dict()
    assert report.dtypes == ("BF16",)
    assert report.logits.merged_error_mean <= 0.1 * report.logits.adapter_effect_mean
    # The last bit may fall either way where fp32 sums differ in their last bit.
    wrong = {key: (stock[key].bfloat16().float() - value).abs().max() for key, value in merged.items()}
    assert all(difference <= stock[key].abs().max() / 128 for key, difference in wrong.items())


def test_the_output_dtype_can_be_chosen_and_the_config_says_it(tmp_path: Path) -> None:
    base = save_tiny_mixtral(tmp_path / "base", dtype="bfloat16")
    folder = save_adapter(base, tmp_path / "adapter")
    report = merge(folder, tmp_path / "out", dtype="float32", show_progress=False)
    assert report.dtypes == ("F32",)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert (logits(load(tmp_path / "out")) - logits(load(base, folder))).abs().max() < 1e-4


def test_a_fresh_adapter_gives_the_base_exactly(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(base, tmp_path / "adapter", b_std=0)
    report = merge(folder, tmp_path / "out", show_progress=False)
    assert (report.targeted, report.proof.changed) == (34, 0)
    assert report.logits.merged_error_max == report.logits.adapter_effect_mean == 0
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(base)))


def test_the_report_stands_beside_the_weights(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge(adapter, tmp_path / "out", show_progress=False)
    written = json.loads((tmp_path / "out" / "merge-report.json").read_text())
    assert written == json.loads(json.dumps(report.as_dict()))
    assert written["proof"]["adapter_tensors"] == 2 * (2 * (4 + 2 + 1))
    assert {name: part["tensors"] for name, part in written["parts"].items()} == {
        "attention": 2 * 4,
        "experts": 2 * 4 * 3,
        "router": 2,
    }
    assert all(0 < part["relative_delta"] < 1 for part in written["parts"].values())
    assert written["proof"]["logits"]["other_experts"] == 0
    assert "34 of 34 targeted, no others" in report.table()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_two_merges_are_the_same_bytes_but_for_the_file_of_their_times(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(adapter, tmp_path / "one" / "merged", show_progress=False)
    ended = stream._results  # the second time the threads end in another order
    monkeypatch.setattr(stream, "_results", lambda *work: reversed(list(ended(*work))))
    merge(adapter, tmp_path / "two" / "merged", show_progress=False)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "merged").iterdir()} for name in ("one", "two")
    )
    times = [json.loads(files.pop("merge-times.json")) for files in (one, two)]
    assert one == two
    assert times[0] != times[1]
    assert times[0].keys() == {"output", "stream_seconds", "proof_seconds"}
    assert b"merge-times.json" not in one["SHA256SUMS"]


def test_a_choice_of_experts_that_rounding_tips_is_told_apart_from_wrong_weights() -> None:
    tipped = proof.LogitFigures(50, 1.0, 1.0, 0.4, 3.0, rerouted_error_mean=0.03, other_experts=0.002)
    proof.judge_logits(tipped, float32=False, rounding=0.05)
    wrong_weights = replace(tipped, rerouted_error_mean=0.3)
    wrong_choices = replace(tipped, other_experts=0.2)
    for figures in (wrong_weights, wrong_choices):
        with pytest.raises(WeightsError, match=r"under the adapter's routing, .*% of the choices of experts differ\)"):
            proof.judge_logits(figures, float32=False, rounding=0.05)


def test_logits_that_are_not_finite_are_refused() -> None:
    figures = proof.LogitFigures(50, 1.0, 1.0, float("nan"), 3.0, None, None)
    with pytest.raises(WeightsError, match="proof: logits: not finite"):
        proof.judge_logits(figures, float32=False, rounding=0.0)


# The proof must be able to fail: each of these breaks the arithmetic once.


def refused(adapter: Path, output: Path, message: str, dtype: str | None = None) -> None:
    with pytest.raises(WeightsError, match=message):
        merge(adapter, output, dtype=dtype, show_progress=False)
    assert not output.exists()
    assert [path for path in output.parent.iterdir() if path.name.startswith(".")] == []


def test_the_logits_refuse_a_wrong_scale(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = finetune.adapters.adapter.Adapter.scale
    monkeypatch.setattr(finetune.adapters.adapter.Adapter, "scale", lambda self, name: 2 * scale(self, name))
    refused(adapter, tmp_path / "out", r"merged model differs from base \+ adapter; got mean difference")


def test_the_logits_refuse_a_wrong_router(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", r=4, lora_alpha=8, target_parameters=[ROUTER])
    scale = finetune.adapters.adapter.Adapter.scale
    monkeypatch.setattr(finetune.adapters.adapter.Adapter, "scale", lambda self, name: -scale(self, name))
    refused(adapter, tmp_path / "out", r"merged model differs from base \+ adapter")


def test_the_logits_refuse_a_confused_order_of_experts(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def expert_major(B_nR: torch.Tensor, experts: int) -> torch.Tensor:
        return B_nR.reshape(B_nR.shape[0], experts, -1).transpose(0, 1)

    monkeypatch.setattr(finetune.adapters.deltas, "by_expert", expert_major)
    refused(adapter, tmp_path / "out", r"merged model differs from base \+ adapter")


def test_the_count_refuses_an_expert_left_out(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = finetune.adapters.deltas.plan

    def without_one(*args: Any) -> dict[str, list[Delta]]:
        return {
            key: deltas for key, deltas in plan(*args).items() if "layers.1.block_sparse_moe.experts.2.w3" not in key
        }

    monkeypatch.setattr(finetune.merge.job, "plan", without_one)
    message = r"layers.1.mlp.experts.base_layer: adapter tensor was not used exactly once; got expert 2 of 4"
    refused(adapter, tmp_path / "out", message)
    # And without that count the logits see it, too.
    monkeypatch.setattr(proof, "prove_usage", lambda *_: 0)
    refused(adapter, tmp_path / "out", r"merged model differs from base \+ adapter")


def test_the_comparison_refuses_a_tensor_changed_without_a_delta(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def with_damage(*args: Any) -> Any:
        log = stream_merged(*args)
        with (args[1] / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x11")
        return log

    monkeypatch.setattr(finetune.merge, "stream_merged", with_damage)
    refused(adapter, tmp_path / "out", "tensor changed without a delta; got 1 such")


def test_a_delta_below_the_number_format_is_refused_and_float32_takes_it(tmp_path: Path) -> None:
    base = save_tiny_mixtral(tmp_path / "base", dtype="bfloat16")
    small = save_adapter(base, tmp_path / "small", b_std=1e-3)
    refused(small, tmp_path / "out", r"below the resolution of the number format .*: merge with --dtype float32")
    tiny = save_adapter(base, tmp_path / "tiny", b_std=1e-12)
    refused(tiny, tmp_path / "out", r"34 of 34 changes vanished in rounding; merge with --dtype float32")
    report = merge(small, tmp_path / "out", dtype="float32", show_progress=False)
    assert report.logits.merged_error_mean < 0.01 * report.logits.adapter_effect_mean
