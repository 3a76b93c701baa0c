"""Adapters of transformers 4, with a module for each expert, merged into bases of either layout."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import MixtralConfig

import finetune.adapters.targets
import tests.foreign
from finetune.errors import WeightsError
from finetune.merge import merge
from tests.families import save_tiny
from tests.foreign.model import COLUMNS, DIMENSIONS, IDS, factors, published_tensors
from tests.support import save_tiny_mixtral, tiny_tokenizer
from tests.unit.foreign_adapters import (
    assert_merged,
    changed_by,
    linear_modules,
    random_factors,
    stacked_as_loaded,
    write_adapter,
)
from tests.unit.merge_adapters import load, save_adapter, tensors

MIXTRAL = "q_proj k_proj v_proj o_proj w1 w2 w3 gate"


def save_named_mixtral(folder: Path, stacked: bool) -> Path:
    """The base of `tests.foreign`, as published or as the loaded model holds it."""
    MixtralConfig(**DIMENSIONS, architectures=["MixtralForCausalLM"]).save_pretrained(folder)
    save_file(published_tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    if stacked:
        load(folder).save_pretrained(folder, save_original_format=False)
    tiny_tokenizer().save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("mixtral"))


def on_mixtral(base: Path, folder: Path, rank: Callable[[str], int] = lambda _: 4, **settings: Any) -> Path:
    modules = linear_modules(base, MIXTRAL)
    pairs = random_factors((path, shape, rank(path)) for path, shape in modules.items())
    return write_adapter(folder, pairs, **settings)


def refused(adapter: Path, base: Path | None, message: str) -> None:
    before = sorted(adapter.parent.iterdir())
    with pytest.raises(WeightsError, match=message):
        merge(adapter, adapter.parent / "out", base=base, show_progress=False)
    assert sorted(adapter.parent.iterdir()) == before


@pytest.mark.parametrize("stacked", [False, True], ids=["per expert", "stacked"])
@pytest.mark.parametrize("made", ["transformers-4", "peft-0.18"])
def test_what_other_versions_made_and_computed(made: str, stacked: bool, tmp_path: Path) -> None:
    base, given = save_named_mixtral(tmp_path / "base", stacked), Path(str(tests.foreign.__file__)).parent / made
    content = json.loads((given / "made.json").read_text())
    adapter = Path(shutil.copytree(given, tmp_path / "adapter"))
    save_file(factors(content["shapes"]), adapter / "adapter_model.safetensors")
    report = merge(adapter, tmp_path / "out", base=base, show_progress=False)
    with torch.no_grad():
        logits = load(tmp_path / "out")(torch.tensor([IDS])).logits[0, :, :COLUMNS]
    torch.testing.assert_close(logits, torch.tensor(content["logits"]), rtol=1e-4, atol=1e-4)
    assert report.logits.adapter_effect_mean > 0.05
    assert report.logits.merged_error_max < 1e-4


def test_a_mixtral_adapter_with_dropout(base: Path, tmp_path: Path) -> None:
    adapter = on_mixtral(base, tmp_path / "adapter")
    report = merge(adapter, tmp_path / "out", base=base, show_progress=False)
    assert_merged(base, tmp_path / "out", changed_by(adapter, 16 / 4))
    assert report.proof.adapter_tensors == 2 * 2 * (4 + 4 * 3 + 1)
    assert report.proof.changed == report.targeted == 2 * (4 + 4 * 3 + 1)


def test_ranks_and_scales_by_the_old_names(base: Path, tmp_path: Path) -> None:
    """PEFT 0.21 reads such an adapter with one scale for w1 and w3, and another one than it was trained with."""
    rank = {"w2": 6, "experts.1.w1": 2}
    alpha = {"w3": 5, "gate": 3}

    def of(path: str, values: dict[str, int], default: int) -> int:
        return next((value for name, value in values.items() if path.endswith(f".{name}")), default)

    settings = {"rank_pattern": rank, "alpha_pattern": alpha, "use_rslora": True}
    adapter = on_mixtral(base, tmp_path / "adapter", rank=lambda path: of(path, rank, 4), **settings)
    merge(adapter, tmp_path / "out", base=base, show_progress=False)
    deltas = changed_by(adapter, lambda path: of(path, alpha, 16) / of(path, rank, 4) ** 0.5)
    assert_merged(base, tmp_path / "out", deltas)


@pytest.mark.parametrize(
    "targets",
    [MIXTRAL.split(), "all-linear", r".*(self_attn\.\w+_proj|block_sparse_moe\.(gate|experts\.\d+\.w[123]))"],
    ids=["names", "all-linear", "regex"],
)
@pytest.mark.parametrize("stacked", [False, True], ids=["per expert", "stacked"])
def test_targets_as_people_write_them(targets: Any, stacked: bool, base: Path, tmp_path: Path) -> None:
    adapter = on_mixtral(base, tmp_path / "adapter", target_modules=targets)
    into = stacked_as_loaded(base, tmp_path / "stacked") if stacked else base
    merge(adapter, tmp_path / "out", base=into, show_progress=False)
    assert_merged(base, tmp_path / "out", changed_by(adapter, 16 / 4), stacked)


@pytest.mark.parametrize("stacked", [False, True], ids=["per expert", "stacked"])
def test_some_experts_only(stacked: bool, base: Path, tmp_path: Path) -> None:
    some = r"model\.layers\.1\.block_sparse_moe\.experts\.[02]\.w[13]"
    modules = {path: shape for path, shape in linear_modules(base, "w1 w3").items() if re.fullmatch(some, path)}
    pairs = random_factors((path, shape, 4) for path, shape in modules.items())
    adapter = write_adapter(tmp_path / "adapter", pairs, target_modules=some)
    into = stacked_as_loaded(base, tmp_path / "stacked") if stacked else base
    report = merge(adapter, tmp_path / "out", base=into, show_progress=False)
    assert report.proof.changed == (1 if stacked else 4)
    assert_merged(base, tmp_path / "out", changed_by(adapter, 16 / 4), stacked)


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("qwen2_moe", "q_proj v_proj gate_proj up_proj down_proj gate shared_expert_gate"),
        ("qwen3_moe", "q_proj v_proj gate_proj up_proj down_proj gate"),
        ("deepseek_v2", "kv_a_proj_with_mqa o_proj gate_proj up_proj down_proj"),
        ("olmoe", "q_proj gate_proj up_proj down_proj gate"),
        ("phimoe", "q_proj w1 w2 w3 gate"),
        ("jamba", "q_proj in_proj gate_proj up_proj down_proj router"),
        ("hunyuan_v1_moe", "q_proj gate_proj up_proj down_proj wg"),
        ("ernie4_5_moe", "q_proj gate_proj up_proj down_proj gate"),
        ("minimax_m2", "q_proj w1 w2 w3 gate"),
        ("granitemoe", "q_proj layer"),
    ],
)
def test_other_architectures(model_type: str, names: str, tmp_path: Path) -> None:
    """Dense layers and shared experts have modules of the same last names; each factor goes to its own."""
    base = save_tiny(model_type, tmp_path / "base")
    modules = linear_modules(base, names)
    pairs = random_factors((path, shape, 4) for path, shape in modules.items())
    adapter = write_adapter(tmp_path / "adapter", pairs, target_modules=names.split())
    report = merge(adapter, tmp_path / "out", base=base, show_progress=False)
    assert_merged(base, tmp_path / "out", changed_by(adapter, 16 / 4))
    assert report.proof.changed == len(modules)


def test_a_router_alone_by_its_module(tmp_path: Path) -> None:
    """It is a parameter now, which PEFT adapts without dropout only."""
    base = save_tiny("qwen3_moe", tmp_path / "base")
    pairs = random_factors((path, shape, 4) for path, shape in linear_modules(base, "gate").items())
    adapter = write_adapter(tmp_path / "adapter", pairs, target_modules=["gate"])
    merge(adapter, tmp_path / "out", base=base, show_progress=False)
    assert_merged(base, tmp_path / "out", changed_by(adapter, 16 / 4))


def test_an_expert_that_the_base_does_not_have(base: Path, tmp_path: Path) -> None:
    names = {"model.layers.0.block_sparse_moe.experts.4.w1": (96, 64)}
    adapter = write_adapter(tmp_path / "adapter", random_factors((n, s, 4) for n, s in names.items()))
    refused(adapter, base, r"tensor matches nothing in the base; got .*layers.0.block_sparse_moe.experts.4.w1; merge")


def test_a_matrix_that_the_settings_name_and_the_file_lacks(base: Path, tmp_path: Path) -> None:
    modules = linear_modules(base, MIXTRAL)
    del modules["model.layers.1.block_sparse_moe.experts.2.w3"]
    adapter = write_adapter(tmp_path / "adapter", random_factors((n, s, 4) for n, s in modules.items()))
    refused(adapter, base, r"has no factors for model.layers.1.block_sparse_moe.experts.2.w3, which its settings name")


def test_factors_of_another_size(base: Path, tmp_path: Path) -> None:
    modules = linear_modules(base, MIXTRAL)
    modules["model.layers.1.block_sparse_moe.experts.2.w3"] = (95, 64)
    adapter = write_adapter(tmp_path / "adapter", random_factors((n, s, 4) for n, s in modules.items()))
    refused(
        adapter,
        base,
        r"experts.2.w3: shape or rank does not fit; got A \[4, 64\] and B \[95, 4\]; .* B \[96, 4\]",
    )


# Each of these is a mistake that others have made; the proof sees it.


@pytest.mark.parametrize("stacked", [False, True], ids=["per expert", "stacked"])
def test_the_logits_refuse_gate_and_up_in_each_others_place(
    stacked: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = on_mixtral(base, tmp_path / "adapter")
    into = stacked_as_loaded(base, tmp_path / "stacked") if stacked else base
    of_one_expert = finetune.adapters.targets._of_one_expert

    def confused(stack: Any, expert: int, number: int) -> Any:
        right, wrong = of_one_expert(stack, expert, number), of_one_expert(stack, expert, -1 - number)
        return right if len(stack.modules[0]) == 1 else type(right)(**{**vars(right), "path": wrong.path})

    monkeypatch.setattr(finetune.adapters.targets, "_of_one_expert", confused)
    refused(adapter, into, r"merged model differs from base \+ adapter")


def test_the_logits_refuse_a_scale_without_its_pattern(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = on_mixtral(base, tmp_path / "adapter", alpha_pattern={"w3": 64})
    monkeypatch.setattr(finetune.adapters.adapter.Adapter, "scale", lambda *_: 16 / 4)
    refused(adapter, base, r"merged model differs from base \+ adapter")


@pytest.mark.parametrize("stacked", [False, True], ids=["per expert", "stacked"])
@pytest.mark.parametrize("last", ["of now", "of then"])
def test_an_adapter_of_then_and_one_of_now_in_one_pass(stacked: bool, last: str, base: Path, tmp_path: Path) -> None:
    into = stacked_as_loaded(base, tmp_path / "stacked") if stacked else base
    then, now = on_mixtral(base, tmp_path / "then"), save_adapter(base, tmp_path / "now", record=False)
    merge(now, tmp_path / "one", base=into, show_progress=False)
    merge(then, tmp_path / "two", base=tmp_path / "one", show_progress=False)
    adapters, weights = ([then, now], [0.5, 1.0]) if last == "of now" else ([now, then], [1.0, 0.5])
    merge(adapters, tmp_path / "sum", weights=weights, base=into, show_progress=False)
    one, two, both = (tensors(tmp_path / name) for name in ("one", "two", "sum"))
    for key, value in both.items():
        torch.testing.assert_close(value, (one[key] + two[key]) / 2, msg=key)


def test_what_stock_peft_makes_of_one_comes_to_the_same(base: Path, tmp_path: Path) -> None:
    """PEFT 0.21 converts such an adapter as it loads it, given one rank for all and no dropout."""
    then = on_mixtral(base, tmp_path / "then", lora_dropout=0.0)
    load(base, then).save_pretrained(str(tmp_path / "now"), save_embedding_layers=False)
    assert any(".mlp.experts.base_layer.lora_A" in name for name in tensors(tmp_path / "now"))
    for name in ("then", "now"):
        merge(tmp_path / name, tmp_path / f"out of {name}", base=base, show_progress=False)
    one, other = tensors(tmp_path / "out of then"), tensors(tmp_path / "out of now")
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, msg=key)


def test_a_base_that_only_the_settings_name_is_proposed_and_not_taken(base: Path, tmp_path: Path) -> None:
    adapter = on_mixtral(base, tmp_path / "adapter", base_model_name_or_path=str(base))
    refused(adapter, None, rf"does not record its base \(finetune.json\); .* with --base: its settings name {base}, wi")
    elsewhere = on_mixtral(base, tmp_path / "elsewhere", base_model_name_or_path="mistralai/Mixtral-8x7B-v0.1")
    refused(elsewhere, None, r"does not record its base \(finetune.json\); name the base checkpoint with --base$")
