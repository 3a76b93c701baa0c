"""An adapter is merged, exported, inspected and trained further as it was trained, on the base it was trained on."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.adapters.adapter import read_adapter
from finetune.adapters.initial import check_same_setup, read_initial_adapter
from finetune.base import base_changes, read_base
from finetune.check.gather import gather
from finetune.checkpoint import differing_settings, forward_settings, write_sums
from finetune.errors import WeightsError
from finetune.evaluate import evaluate
from finetune.export import export
from finetune.inspect import inspect
from finetune.merge import merge
from finetune.model import save_adapter, snapshot_adapter
from finetune.run import RunFolder
from finetune.upcycle import open_source
from tests.equivalence.dpo_runs import dpo_recipe, write_pairs
from tests.support import save_tiny_mixtral
from tests.unit.merge_adapters import save_adapter as save_foreign
from tests.unit.test_initial_adapter import adapted_base, disturb, recipe_on
from tests.unit.test_model import edit_config, recipe_for

SETTINGS, RECORD, WEIGHTS, SUMS = "adapter_config.json", "finetune.json", "adapter_model.safetensors", "SHA256SUMS"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and an adapter of this toolkit on it."""
    folder = tmp_path_factory.mktemp("made")
    base, adapter = save_tiny_mixtral(folder / "base"), folder / "adapter"
    recipe = dpo_recipe(base, write_pairs(folder / "pairs.jsonl", 4), adapter)
    _, model = adapted_base(recipe)
    disturb(model)
    adapter.mkdir()
    read = read_base(recipe)
    save_adapter(snapshot_adapter(model, read.family), adapter, recipe, read)
    read.tokenizer.save_pretrained(adapter)
    write_sums(adapter)
    return base, adapter


@pytest.fixture
def base(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(made[0], tmp_path / "base")


@pytest.fixture
def adapter(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(made[1], tmp_path / "adapter")


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def multiply_factors(adapter: Path) -> None:
    file = adapter / WEIGHTS
    save_file({name: 1.5 * factor for name, factor in load_file(file).items()}, file)


READERS: dict[str, Callable[[Path], object]] = {
    "merge": lambda adapter: merge(adapter, adapter.parent / "out", base=adapter.parent / "base", show_progress=False),
    "export for vLLM": lambda adapter: export(adapter, adapter.parent / "out", "vllm", base=adapter.parent / "base"),
    "export for PEFT": lambda adapter: export(adapter, adapter.parent / "out", "peft"),
    "inspect": inspect,
    "model.adapter": read_initial_adapter,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_settings_changed_in_a_partial_copy_are_refused_by_every_reader(
    read: Callable[[Path], object], adapter: Path, base: Path
) -> None:
    (adapter / SUMS).unlink()
    read_adapter(adapter)  # a copy without its checksums is fine while all values agree
    edit(adapter / SETTINGS, lora_alpha=32)
    message = (
        rf"{SETTINGS}: lora_alpha: differs from {RECORD}, which was written in training and has 8.0; got 32; fetch"
    )
    with pytest.raises(WeightsError, match=message):
        read(adapter)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("sums", [True, False], ids=["with checksums", "without checksums"])
def test_other_weights_are_refused_by_every_reader(
    read: Callable[[Path], object], sums: bool, adapter: Path, base: Path
) -> None:
    multiply_factors(adapter)
    if not sums:
        (adapter / SUMS).unlink()
    said = f"differs from its sum in {SUMS}" if sums else f"the weights are not those that {RECORD} was written for"
    with pytest.raises(WeightsError, match=f"{WEIGHTS}: {said}; got "):
        read(adapter)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("r", 8),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 1}),
        ("use_rslora", True),
        ("target_modules", ["q_proj"]),
        ("target_parameters", None),
        ("layers_to_transform", [0]),
        ("exclude_modules", ["k_proj"]),
    ],
)
def test_every_deciding_setting_is_held_against_the_record(setting: str, value: object, adapter: Path) -> None:
    (adapter / SUMS).unlink()
    edit(adapter / SETTINGS, **{setting: value})
    with pytest.raises(WeightsError, match=rf"{SETTINGS}: {setting}: differs from {RECORD}, which was written in tra"):
        read_adapter(adapter)


def test_a_record_of_an_earlier_version_still_holds_its_recipe(adapter: Path) -> None:
    (adapter / SUMS).unlink()
    edit(adapter / RECORD, settings=None, sha256=None)
    read_adapter(adapter)
    edit(adapter / SETTINGS, lora_alpha=32)
    with pytest.raises(WeightsError, match=r"lora_alpha: differs from finetune.json"):
        read_adapter(adapter)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "top-k": ({"num_experts_per_tok": 1}, "num_experts_per_tok 1 for 2"),
    "rope": (
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        r"rope_parameters.rope_theta 500000.0 f",
    ),
    "eps": ({"rms_norm_eps": 1e-3}, "rms_norm_eps 0.001 for 1e-05"),
    "window": ({"sliding_window": 16}, "sliding_window 16 for None"),
    "heads": ({"num_key_value_heads": 4}, "num_key_value_heads 4 for "),
    "activation": ({"hidden_act": "gelu"}, "hidden_act gelu for silu"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_base_whose_config_decides_another_forward_is_refused(
    change: dict[str, Any], message: str, base: Path, made: tuple[Path, Path], tmp_path: Path
) -> None:
    edit_config(base, **change)
    forward = forward_settings(base)
    assert any(message.split(" ")[0] in line for line in differing_settings(forward_settings(made[0]), forward))
    if "num_key_value_heads" in change:
        return  # the weights do not load so
    with pytest.raises(WeightsError, match=rf"config.json: the base's config.json decides another forward .*{message}"):
        merge(made[1], tmp_path / "out", base=base, show_progress=False)


@pytest.mark.parametrize(
    "change", [{"use_cache": False}, {"output_router_logits": True}, {"router_aux_loss_coef": 0.5}, {"eos_token_id": 7}]
)
def test_settings_that_do_not_decide_the_forward_may_differ(
    change: dict[str, Any], base: Path, made: tuple[Path, Path]
) -> None:
    edit_config(base, **change)
    assert differing_settings(forward_settings(made[0]), forward_settings(base)) == []


def test_a_default_equals_what_is_left_out_and_old_names_equal_new_ones(base: Path, made: tuple[Path, Path]) -> None:
    config = json.loads((base / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    config.pop("hidden_act")
    (base / "config.json").write_text(json.dumps({**config, "rope_theta": theta}))
    assert differing_settings(forward_settings(made[0]), forward_settings(base)) == []


def test_training_further_needs_a_base_of_the_same_config(base: Path, made: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_on(made[0], write_pairs(tmp_path / "pairs.jsonl", 4), made[1])
    read = read_base(recipe)
    initial = read_initial_adapter(made[1])
    check_same_setup(initial, recipe, read.provenance, read.tokenizer.chat_template)
    changed = read.provenance.model_copy(update={"config": {**(read.provenance.config or {}), "rms_norm_eps": 0.5}})
    with pytest.raises(WeightsError, match=r"model.adapter: .* a base with another config.json; got rms_norm_eps 0.5"):
        check_same_setup(initial, recipe, changed, read.tokenizer.chat_template)


def test_a_run_does_not_continue_on_another_base(base: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    started = read_base(recipe_for(base))
    assert base_changes(started, run) == [], "nothing is recorded yet"
    run.provenance.write_text(json.dumps({"base": started.provenance.as_dict()}))
    assert base_changes(started, run) == []
    file = base / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}, file, {"format": "pt"})
    (change,) = base_changes(read_base(recipe_for(base)), run)
    assert change.key == "model.name_or_path"
    assert change.before == f"{base} with the fingerprint {str(started.provenance.fingerprint)[:12]}"
    assert change.now != change.before
    save_file(tensors, file, {"format": "pt"})
    edit_config(base, num_experts_per_tok=1)
    (change,) = base_changes(read_base(recipe_for(base)), run)
    assert (change.before, change.now) == (f"{base} with another config.json", "num_experts_per_tok 1 for 2")


def test_a_checkpoint_with_checksums_is_verified_by_every_reader(base: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}')
    write_sums(base)
    edit_config(base, use_cache=True)
    readers: list[Callable[[], object]] = [
        lambda: read_base(recipe_for(base)),
        lambda: evaluate(base, rows, "prompt_completion"),
        lambda: open_source(base, None),
        lambda: merge(save_foreign(base, tmp_path / "foreign"), tmp_path / "merged", show_progress=False),
        lambda: inspect(base),
    ]
    for read in readers:
        with pytest.raises(WeightsError, match=r"config.json: differs from its sum in SHA256SUMS"):
            read()
    problems = gather(recipe_for(base), "recipe.yaml", 0).problems
    assert [problem.what for problem in problems if problem.where.endswith("config.json")] == [
        "differs from its sum in SHA256SUMS"
    ]


def test_an_adapter_of_another_tool_with_dropout_on_stacks_is_merged_and_proven(base: Path, tmp_path: Path) -> None:
    adapter = save_foreign(base, tmp_path / "foreign")
    edit(adapter / SETTINGS, lora_dropout=0.05)
    assert merge(adapter, tmp_path / "out", show_progress=False).logits.merged_error_max < 1e-4


@pytest.mark.parametrize("trained", ["nothing", "attention"])
def test_what_an_adapter_leaves_as_it_is_is_said_everywhere(trained: str, base: Path, tmp_path: Path) -> None:
    adapter = save_foreign(base, tmp_path / "idle", b_std=0 if trained == "nothing" else 0.05)
    file = adapter / WEIGHTS
    factors = load_file(file)
    save_file({name: 0 * factor if ".mlp." in name else factor for name, factor in factors.items()}, file)
    merged = merge(adapter, tmp_path / "out", show_progress=False).table()
    card = (tmp_path / "out" / "README.md").read_text()
    exported = "\n".join(export(adapter, tmp_path / "copy", "peft").lines)
    if trained == "nothing":
        assert "NO EFFECT" in card
        assert (
            "NO EFFECT            every B is zero, so the merged model is the base: the adapter was not trained"
            in merged
        )
        assert "none on any weight: every B is zero, as before training" in inspect(adapter)
        assert "NO EFFECT on 14 of 14 targets: their B is zero" in exported
    else:
        assert re.search(r"NO EFFECT +on experts, router, where every B is zero: it was not trained", merged)
        assert "none on 6 of 14 targets, whose B is zero: model.layers.0.mlp" in " ".join(inspect(adapter).split())
        assert "NO EFFECT on 6 of 14 targets" in exported


def test_experts_in_differing_number_formats_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_foreign(base, tmp_path / "adapter")
    file = base / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    save_file({**tensors, name: tensors[name].to(torch.bfloat16)}, file, {"format": "pt"})
    with pytest.raises(WeightsError, match=rf"{name}: experts of .*gate_up_proj are stored in differing .* 3 in F32"):
        read_base(recipe_for(base))
    edit(adapter / RECORD, base={"name_or_path": str(base)})
    with pytest.raises(WeightsError, match=r"are stored in differing number formats, and a stack has one"):
        merge(adapter, tmp_path / "out", show_progress=False)


def test_a_config_that_names_another_dtype_is_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "config.json says" not in inspect(base)
    adapter = save_foreign(base, tmp_path / "adapter")
    edit_config(base, dtype="bfloat16")
    assert "F32 (config.json says bfloat16)" in inspect(base)
    merge(adapter, tmp_path / "out")
    assert "the base's config.json says bfloat16, and no matrix is stored so" in capsys.readouterr().out
