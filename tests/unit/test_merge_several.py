"""Several adapters in one pass: chains (each trained on what the ones before it made) and weighted sums."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import finetune.merge.job
from finetune.adapters.deltas import plan
from finetune.adapters.lineage import made_from
from finetune.checkpoint import fingerprint
from finetune.errors import WeightsError
from finetune.merge import merge
from tests.support import save_tiny_mixtral
from tests.unit.merge_adapters import EXPERTS, load, logits, save_adapter, tensors


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def first(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On attention, experts and router."""
    return save_adapter(base, tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def second(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On attention and experts, of another rank, with other factors."""
    folder = tmp_path_factory.mktemp("second")
    lora: dict[str, Any] = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj"], "target_parameters": [*EXPERTS]}
    return save_adapter(base, folder, b_std=0.07, **lora)


def chained(first: Path, base: Path, folder: Path, **lora: Any) -> tuple[Path, Path]:
    """The model merged from `first`, and an adapter that was trained on it and says so."""
    merged = folder / "merged"
    merge(first, merged, base=base, show_progress=False)
    adapter = save_adapter(merged, folder / "next", **lora)
    record = json.loads((adapter / "finetune.json").read_text())
    record["base"]["made_from"] = made_from(merged, fingerprint(merged))
    (adapter / "finetune.json").write_text(json.dumps(record))
    return merged, adapter


def test_a_chain_in_one_pass_is_the_chain_in_two(base: Path, first: Path, tmp_path: Path) -> None:
    merged, then = chained(first, base, tmp_path, b_std=0.03)
    report = merge([first, then], tmp_path / "out", show_progress=False)
    adapted = logits(load(merged, then))
    assert (adapted - logits(load(merged))).abs().max() > 0.1
    assert (logits(load(tmp_path / "out")) - adapted).abs().max() < 1e-4
    assert report.logits.merged_error_max < 1e-4
    assert report.base == str(base)
    assert [each["weight"] for each in report.adapters] == [1, 1]


def test_of_a_chain_the_output_is_rounded_once(tmp_path: Path) -> None:
    base = save_tiny_mixtral(tmp_path / "base", dtype="bfloat16")
    first = save_adapter(base, tmp_path / "first", b_std=0.3)
    _, then = chained(first, base, tmp_path, b_std=0.2)
    merge([first, then], tmp_path / "out", show_progress=False)
    merge([first, then], tmp_path / "exact", dtype="float32", show_progress=False)
    exact, found = tensors(tmp_path / "exact"), tensors(tmp_path / "out")
    assert all(torch.equal(value, exact[key].bfloat16()) for key, value in found.items())


@pytest.mark.parametrize("weights", [None, [0.5, 0.5], [1.0, -0.3]], ids=["1 each", "mean", "one taken away"])
def test_a_sum_is_the_weighted_sum_of_the_changes(
    base: Path, first: Path, second: Path, tmp_path: Path, weights: list[float] | None
) -> None:
    merge([first, second], tmp_path / "both", weights=weights, show_progress=False)
    alone = []
    for number, adapter in enumerate((first, second)):
        merge(adapter, tmp_path / str(number), show_progress=False)
        alone.append(tensors(tmp_path / str(number)))
    plain, found = tensors(base), tensors(tmp_path / "both")
    one, two = weights or [1.0, 1.0]
    for key, value in plain.items():
        wanted = value + one * (alone[0][key] - value) + two * (alone[1][key] - value)
        torch.testing.assert_close(found[key], wanted, atol=1e-6, rtol=1e-5)
        assert torch.equal(found[key], value) == (
            torch.equal(alone[0][key], value) and torch.equal(alone[1][key], value)
        )


def test_the_report_names_each_adapter_with_its_weight(first: Path, second: Path, tmp_path: Path) -> None:
    report = merge([first, second], tmp_path / "out", weights=[0.5, 2], show_progress=False)
    written = json.loads((tmp_path / "out" / "merge-report.json").read_text())["adapters"]
    assert [(each["name_or_path"], each["weight"]) for each in written] == [(str(first), 0.5), (str(second), 2)]
    assert written[0]["sha256"] != written[1]["sha256"]
    count = len(load_file(first / "adapter_model.safetensors")) + len(load_file(second / "adapter_model.safetensors"))
    assert report.proof.adapter_tensors == count
    assert f"0.5 x {first}" in report.table()
    assert f"2 x {second}" in report.table()


def test_the_proof_sees_a_weight_that_was_not_applied(
    first: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        finetune.merge.job, "plan", lambda base, adapter, family, _, owner: plan(base, adapter, family, 1, owner)
    )
    refused([first, second], tmp_path, r"merged model differs from base \+ adapter", weights=[1, 0.2])


def refused(adapters: list[Path], folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(WeightsError, match=message):
        merge(adapters, folder / "out", show_progress=False, **options)
    assert not (folder / "out").exists()


def test_what_cannot_be_added_up_is_refused(base: Path, first: Path, second: Path, tmp_path: Path) -> None:
    refused([first, second], tmp_path, "--weights: number of weights differs .*; got 1 for 2 adapters", weights=[0.5])
    refused([first, first], tmp_path, "the same adapter is given twice; .*; name it once, with the sum of the weights")
    other = save_tiny_mixtral(tmp_path / "other", seed=1)
    stranger = save_adapter(other, tmp_path / "stranger", b_std=0.04)
    refused([first, stranger], tmp_path, "base fingerprint differs; got .* where the adapter records")


def test_a_chain_must_be_whole_and_in_order(base: Path, first: Path, second: Path, tmp_path: Path) -> None:
    _, then = chained(first, base, tmp_path, b_std=0.04)
    what = "was trained on a checkpoint with these adapters merged in: [0-9a-f]{12} x 1; got "
    refused([then], tmp_path, f"{what}none; name just these before it", base=base)
    refused([then, first], tmp_path, f"{what}none", base=base)
    refused([second, then], tmp_path, what)
    refused([first, then], tmp_path, f"{what}[0-9a-f]{{12}} x 0.5; .* with these weights", weights=[0.5, 1])
    other = save_tiny_mixtral(tmp_path / "other", seed=1)
    record = json.loads((then / "finetune.json").read_text())
    record["base"]["made_from"]["base_fingerprint"] = fingerprint(other)
    (then / "finetune.json").write_text(json.dumps(record))
    refused([first, then], tmp_path, "was trained on a checkpoint that was merged from another base")


def test_a_report_of_other_weights_says_nothing_of_these(base: Path, first: Path, tmp_path: Path) -> None:
    merge(first, tmp_path / "merged", show_progress=False)
    found = fingerprint(tmp_path / "merged")
    assert made_from(tmp_path / "merged", found) is not None
    assert made_from(tmp_path / "merged", "0" * 64) is None
    assert made_from(base, fingerprint(base)) is None
