"""The adapter that training starts from: loaded whole, or refused with everything that differs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from finetune.adapters.adapter import WEIGHTS_FILE
from finetune.adapters.initial import (
    InitialAdapter,
    check_same_factors,
    check_same_setup,
    read_initial_adapter,
)
from finetune.adapters.record import BaseRecord
from finetune.base import Base, read_base
from finetune.errors import WeightsError
from finetune.model import adapt, load_base, save_adapter, snapshot_adapter
from finetune.recipe import Recipe
from tests.equivalence.dpo_runs import dpo_recipe, write_pairs
from tests.families import save_tiny
from tests.support import CHATML, save_tiny_mixtral
from tests.unit.engine import trained_model

BASE = BaseRecord(name_or_path="models/base", fingerprint="0123")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 4)


@pytest.fixture(scope="module")
def saved(base: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "adapter"
    folder.mkdir()
    recipe = dpo_recipe(base, pairs, folder)
    record, model = adapted_base(recipe)
    disturb(model)
    save_adapter(snapshot_adapter(model, record.family), folder, recipe, record)
    record.tokenizer.save_pretrained(folder)
    return folder


def test_an_adapter_is_saved_as_peft_saves_it_and_training_on_does_not_change_what_was_copied(
    base: Path, pairs: Path, tmp_path: Path
) -> None:
    recipe = dpo_recipe(base, pairs, tmp_path / "run")
    record, model = adapted_base(recipe)
    disturb(model)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    snapshot = snapshot_adapter(model, record.family)
    disturb(model)
    save_adapter(snapshot, tmp_path / "ours", recipe, record)
    ours, theirs = ((tmp_path / name) for name in ("ours", "peft"))
    assert (ours / WEIGHTS_FILE).read_bytes() == (theirs / WEIGHTS_FILE).read_bytes()
    settings, wanted = (json.loads((folder / "adapter_config.json").read_text()) for folder in (ours, theirs))
    assert settings.pop("target_modules") == sorted(wanted.pop("target_modules"))
    assert settings | {"base_model_name_or_path": None} == wanted | {"base_model_name_or_path": None}
    assert not (ours / "README.md").exists(), "PEFT's card has only blanks to fill in"


def adapted_base(recipe: Recipe, initial: InitialAdapter | None = None) -> tuple[Base, PeftModel]:
    """The base's record, under a fixed name and fingerprint, and the model with a fresh adapter or an initial one."""
    record = replace(read_base(recipe), provenance=BASE)
    return record, adapt(load_base(record, recipe.model), record, recipe, initial_adapter=initial)


def disturb(model: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.device)


def recipe_on(base: Path, pairs: Path, adapter: Path, **changes: Any) -> Recipe:
    model = {"adapter": str(adapter), **changes.pop("model", {})}
    return dpo_recipe(base, pairs, Path("runs/next"), model=model, **changes)


def complaints(adapter: Path, recipe: Recipe, fingerprint: str = "0123", template: str = CHATML) -> list[str]:
    base = BASE.model_copy(update={"fingerprint": fingerprint})
    with pytest.raises(WeightsError) as caught:
        check_same_setup(read_initial_adapter(adapter), recipe, base, template)
    return str(caught.value).replace(str(adapter), "ADAPTER").split("\n")


def test_every_factor_is_taken_over(base: Path, pairs: Path, saved: Path) -> None:
    recipe = recipe_on(base, pairs, saved)
    check_same_setup(read_initial_adapter(saved), recipe, BASE, CHATML)
    trained = {}
    for name, initial in (("fresh", None), ("on", read_initial_adapter(saved))):
        torch.manual_seed(0)
        _, model = adapted_base(recipe, initial)
        if initial is None:
            torch.manual_seed(recipe.seed)
            disturb(model)
        trained[name] = {key: value for key, value in model.named_parameters() if value.requires_grad}
    assert trained["fresh"].keys() == trained["on"].keys()
    assert all(value.dtype == torch.float32 for value in trained["on"].values())
    changed = [key for key, value in trained["on"].items() if "lora_B" in key and not value.any()]
    assert changed == [], "no factor stayed as a fresh one is"


def test_what_was_taken_over_is_written_beside_the_next_adapter(
    base: Path, pairs: Path, saved: Path, tmp_path: Path
) -> None:
    recipe, initial = recipe_on(base, pairs, saved), read_initial_adapter(saved)
    used, model = adapted_base(recipe, initial)
    save_adapter(snapshot_adapter(model, used.family), tmp_path, recipe, used, None, initial)
    record = json.loads((tmp_path / "finetune.json").read_text())
    assert record["adapter"] == {"name_or_path": str(saved), "sha256": initial.digest()}
    assert read_initial_adapter(tmp_path).digest() == initial.digest(), "the same weights"


def test_moved_correction_biases_come_along(pairs: Path, tmp_path: Path) -> None:
    base = save_tiny("deepseek_v3", tmp_path / "base")
    moving = {"router_aux_loss_coef": 0.1, "bias_update_rate": 0.01}
    recipe = dpo_recipe(base, pairs, tmp_path, router=moving)
    record, model = adapted_base(recipe)
    biases = [p for name, p in [*model.named_parameters(), *model.named_buffers()] if "correction_bias" in name]
    for bias in biases:
        bias.data += 0.25
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    save_adapter(snapshot_adapter(model, record.family), first, recipe, record)
    initial = read_initial_adapter(first)
    going_on = dpo_recipe(base, pairs, tmp_path, router={"router_aux_loss_coef": 0.1})
    record, model = adapted_base(going_on, initial)
    found = [p for name, p in [*model.named_parameters(), *model.named_buffers()] if "correction_bias" in name]
    assert [each.tolist() for each in found] == [each.tolist() for each in biases]
    save_adapter(snapshot_adapter(model, record.family), second, going_on, record, None, initial)
    assert (second / "router_bias.safetensors").read_bytes() == (first / "router_bias.safetensors").read_bytes()


def test_another_base_is_refused(base: Path, pairs: Path, saved: Path) -> None:
    assert complaints(saved, recipe_on(base, pairs, saved), fingerprint="4567") == [
        "model.adapter: the adapter in ADAPTER was made on another base, models/base with other weights; "
        f"got {base}; name that base in model.name_or_path, or an adapter that was made on this one"
    ]


def test_another_quantisation_is_refused(base: Path, pairs: Path, saved: Path) -> None:
    assert complaints(saved, recipe_on(base, pairs, saved, model={"load_in_4bit": False})) == [
        "model.load_in_4bit: quantisation of the base of the adapter in ADAPTER is 'nf4'; got None; "
        "make the recipe the same as the adapter's, or train an adapter of your own first"
    ]


def test_another_template_is_refused(base: Path, pairs: Path, saved: Path) -> None:
    changed = recipe_on(base, pairs, saved, data={"chat_template": "mistral"})
    assert complaints(saved, changed, template="another") == [
        "data.chat_template: the adapter in ADAPTER was trained with another chat template; got mistral; "
        "write data.chat_template: ADAPTER/chat_template.jinja, or what the adapter's recipe has there"
    ]


def test_other_variables_of_the_template_are_refused(base: Path, pairs: Path, saved: Path, tmp_path: Path) -> None:
    assert complaints(saved, recipe_on(base, pairs, saved, data={"template_args": {"quick": True}})) == [
        "data.template_args: the adapter in ADAPTER was trained with other variables of the chat template; "
        'got {"quick": true}; write {}'
    ]
    copy = shutil.copytree(saved, tmp_path / "adapter")
    record = json.loads((copy / "finetune.json").read_text())
    (copy / "finetune.json").write_text(json.dumps({**record, "template_args": {"quick": True}}))
    same = recipe_on(base, pairs, copy, data={"template_args": {"quick": True}})
    check_same_setup(read_initial_adapter(copy), same, BASE, CHATML)


def test_everything_that_differs_in_lora_is_named_at_once(base: Path, pairs: Path, saved: Path) -> None:
    lora = {"r": 8, "lora_alpha": 16.0, "targets": ["attention"], "use_rslora": True}
    found = complaints(saved, recipe_on(base, pairs, saved, lora=lora))
    assert [line.partition(":")[0] for line in found] == [
        *("lora.targets", "lora.r", "lora.lora_alpha", "lora.expert_r", "lora.expert_lora_alpha", "lora.use_rslora")
    ]
    assert found[1] == (
        "lora.r: of the adapter in ADAPTER is 4; got 8; "
        "make the recipe the same as the adapter's, or train an adapter of your own first"
    )


def test_of_a_run_it_is_the_finished_adapter(saved: Path) -> None:
    assert read_initial_adapter(saved.parent).folder == saved


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="name the output_dir of a finished run, RUN/checkpoint-N or RUN@best"):
        read_initial_adapter(tmp_path)


def test_another_choice_of_experts_than_the_one_taken_over_is_refused(
    base: Path, pairs: Path, saved: Path, tmp_path: Path
) -> None:
    """The adapter's own is taken, so the recipe's share, score and tokens would be ignored."""
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    record = json.loads((folder / "finetune.json").read_text())
    record["recipe"]["lora"] |= {"experts": "auto", "experts_share": 0.5}
    (folder / "finetune.json").write_text(json.dumps(record))
    auto: dict[str, Any] = {"experts": "auto", "experts_share": 0.5}
    check_same_setup(read_initial_adapter(folder), recipe_on(base, pairs, folder, lora=auto), BASE, CHATML)
    others = {**auto, "experts_share": 0.9, "experts_score": "token", "experts_tokens": 5}
    found = complaints(folder, recipe_on(base, pairs, folder, lora=others))
    assert [line.partition(":")[0] for line in found] == [
        *("lora.experts_share", "lora.experts_score", "lora.experts_tokens")
    ]
    assert found[0].startswith("lora.experts_share: of the adapter in ADAPTER is 0.5; got 0.9; ")
    every = complaints(folder, recipe_on(base, pairs, folder))
    assert [line.partition(":")[0] for line in every] == ["lora.experts"]


DAMAGED = [
    '{"recipe": {}, "base": {}}',
    '{"recipe": {"lora": {"r": "x"}}, "base": {}}',
    '{"recipe": {"lora": LORA}, "base": "models/base"}',
    '{"recipe": {"lora": LORA}, "base": {}, "experts": {"score": "gate"}}',
    '{"recipe": {"lora": LORA}, "base": {}, "added_tokens": null}',
]


@pytest.mark.parametrize("record", [None, "{", "[]", '{"format": 1}', *DAMAGED])
def test_an_adapter_that_does_not_say_what_it_was_made_on_is_refused(
    saved: Path, tmp_path: Path, record: str | None
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    (folder / "finetune.json").unlink()
    if record is not None:
        lora = json.dumps({"targets": ["attention"], "r": 4, "lora_alpha": 8.0})
        (folder / "finetune.json").write_text(record.replace("LORA", lora))
    with pytest.raises(WeightsError) as caught:
        read_initial_adapter(folder)
    assert str(caught.value) == (
        "model.adapter: the adapter does not say what it was made on: its finetune.json is missing or damaged; "
        f"got {folder}; use an adapter of this toolkit; merge another tool's and name the merged model as the base"
    )


def test_an_adapter_of_other_factors_is_refused_before_a_weight_is_read(base: Path, pairs: Path, saved: Path) -> None:
    """Its record may have been edited; its tensors tell."""
    recipe = recipe_on(base, pairs, saved, lora={"r": 2})
    with pytest.raises(WeightsError, match="factor has another shape than the model's"):
        adapted_base(recipe, read_initial_adapter(saved))


# The factors on disk against those in memory.

DO = "continue with the model, the recipe and the versions that made it, or start anew in another output_dir"
LAYER = "base_model.model.model.layers.0"


@pytest.fixture
def model(tmp_path: Path) -> object:
    """An adapted model, and its adapter in `tmp_path`."""
    model = trained_model(save_tiny_mixtral(tmp_path / "base"))
    model.save_pretrained(str(tmp_path))
    return model


def complaint(model: object, folder: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        check_same_factors(model, folder)
    return str(caught.value).replace(f"{folder / WEIGHTS_FILE}: ", "")


def edit(folder: Path, changed: dict[str, torch.Tensor | None]) -> None:
    """Set or take away tensors of the saved adapter."""
    tensors = load_file(folder / WEIGHTS_FILE)
    for key, value in changed.items():
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value
    save_file(tensors, folder / WEIGHTS_FILE)


def test_its_own_adapter_is_taken(model: object, tmp_path: Path) -> None:
    check_same_factors(model, tmp_path)


def test_factors_of_single_experts_are_another_layout(model: object, tmp_path: Path) -> None:
    """As adapters of transformers 4 have them."""
    experts = f"{LAYER}.mlp.experts"
    edit(tmp_path, {f"{experts}.lora_A.weight": None, f"{experts}.0.w2.lora_A.weight": torch.zeros(4, 96)})
    assert complaint(model, tmp_path).splitlines() == [
        f"the adapter has no such factors; got {experts}.lora_A.weight; {DO}",
        "the model has no such factors; the adapter was made for another layout; "
        f"got {experts}.0.w2.lora_A.weight; {DO}",
    ]


def test_another_rank_is_another_shape(model: object, tmp_path: Path) -> None:
    name = f"{LAYER}.self_attn.q_proj.lora_A.weight"
    edit(tmp_path, {name: torch.zeros(8, 64)})
    assert complaint(model, tmp_path) == (
        f"{name}: factor has another shape than the model's [4, 64]; got [8, 64]; {DO}"
    )
