"""In which order a file holds its experts' factors: as declared, as the shapes say, or as asked; never guessed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune.adapters.deltas
import finetune.cli.merge
from finetune.errors import WeightsError
from finetune.merge import LAYOUTS, merge
from tests.families import save_tiny
from tests.unit.merge_adapters import adapter_on_all, save_adapter, tensors

Tensors = dict[str, torch.Tensor]
UNSLOTH = {"base_model_class": "OlmoeForCausalLM", "parent_library": "transformers", "unsloth_fixed": True}


def rewritten(adapter: Path, folder: Path, layout: str, nested: bool = True, **settings: Any) -> Path:
    """An adapter of PEFT 0.21 as another tool writes the same change: settings with the given differences."""
    experts = 4
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in tensors if ".experts" in name and ".lora_A." in name]:
        A, B = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        pairs = [(A[e * (len(A) // experts) : (e + 1) * (len(A) // experts)], B[:, e::experts]) for e in range(experts)]
        if layout.endswith("0.18"):
            pairs = [(B_e.T, A_e.T) for A_e, B_e in pairs]
        tensors[name] = torch.cat([A_e for A_e, _ in pairs])
        columns = [B_e for _, B_e in pairs]
        major = torch.cat(columns, dim=1) if layout.startswith("expert") else torch.stack(columns, dim=2).flatten(1)
        tensors[name.replace("lora_A", "lora_B")] = major.contiguous()
    if not nested:
        outer = {name: name.replace("experts.", "experts.base_layer.") for name in tensors if ".experts.lora" in name}
        turned = outer | {inner: name for name, inner in outer.items()}
        tensors = {turned.get(name, name): value for name, value in tensors.items()}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("olmoe", tmp_path_factory.mktemp("olmoe"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_on_all(base, tmp_path_factory.mktemp("adapter"), r=3)


@pytest.fixture(scope="module")
def merged(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "out"
    merge(adapter, folder, show_progress=False)
    return folder


def refused(adapter: Path, base: Path, message: str, layout: str | None = None) -> None:
    before = sorted(adapter.parent.iterdir())
    with pytest.raises(WeightsError, match=message):
        merge(adapter, adapter.parent / "out", base=base, layouts=[layout] if layout else None, show_progress=False)
    assert sorted(adapter.parent.iterdir()) == before


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("nested", [True, False], ids=["by definition", "by name"])
def test_every_layout_comes_to_the_same(
    layout: str, nested: bool, base: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    foreign = rewritten(adapter, tmp_path / "foreign", layout, nested, peft_version=None)
    merge(foreign, tmp_path / "out", base=base, layouts=[layout], show_progress=False)
    ours, theirs = tensors(merged), tensors(tmp_path / "out")
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, msg=key)


def test_the_command_offers_every_layout() -> None:
    assert tuple(LAYOUTS) == finetune.cli.merge.LAYOUTS


def test_experts_with_one_rank_have_no_order(base: Path, tmp_path: Path) -> None:
    """Nor are inputs and outputs in doubt where a shape tells them apart."""
    adapter = adapter_on_all(base, tmp_path / "adapter", r=1, rank_pattern={}, alpha_pattern={})
    mine = rewritten(adapter, tmp_path / "foreign", "expert-major", peft_version="0.21.2", auto_mapping=UNSLOTH)
    merge(mine, tmp_path / "out", base=base, show_progress=False)


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("peft", {"peft_version": "0.21.2"}),
        ("peft", {"peft_version": "0.19.1@3f1c9a2"}),
        ("peft-0.18", {"peft_version": "0.18.1"}),
        ("peft", {"auto_mapping": UNSLOTH, "lora_B_layout": "rank_major"}),
        ("expert-major", {"auto_mapping": UNSLOTH, "lora_B_layout": "grouped_by_expert"}),
        ("expert-major-0.18", {"lora_B_layout": "grouped_by_expert", "peft_version": None}),
    ],
)
def test_the_settings_declare_the_order(
    layout: str, settings: dict[str, Any], base: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    """Stock PEFT by its version, Unsloth by a setting of its own, which PEFT does not know."""
    foreign = rewritten(adapter, tmp_path / "foreign", layout, **settings)
    merge(foreign, tmp_path / "out", base=base, show_progress=False)
    for key, value in tensors(merged).items():
        torch.testing.assert_close(tensors(tmp_path / "out")[key], value, msg=key)


@pytest.mark.parametrize(
    ("layout", "settings", "message"),
    [
        (
            "peft",
            {"peft_version": None},
            r"adapter_config.json: the order of the .* got neither a record nor a version of PEFT; say which tool "
            r"trained it, with --layout: peft \(PEFT since 0.19, Unsloth .*\), expert-major \(Unsloth "
            r"before September 2026: ",
        ),
        (
            "peft-0.18",
            {"peft_version": None},
            r"--layout: peft-0.18 \(PEFT 0.17 and 0.18, .*\), expert-major-0.18 \(the same, saved with PEFT 0.17 or",
        ),
        ("expert-major", {"auto_mapping": UNSLOTH}, r"got Unsloth's own setting; .*: peft \(.*\), expert-major \("),
        (
            "peft",
            {"lora_B_layout": "by_rank"},
            'order of the experts\' factors; got "by_rank"; only rank_major and grouped',
        ),
        ("peft", {"peft_version": "0.18.2.dev0"}, r"got neither a record nor a version of PEFT"),
        ("peft", {"peft_version": "a fork"}, r"got neither a record nor a version of PEFT"),
        (
            "peft-0.18",
            {"peft_version": "0.21.2"},
            r"made for another layout: input and output are swapped",
        ),
        ("peft", {"peft_version": "0.18.1"}, r"made for another layout: input and output are swapped"),
    ],
    ids=[
        "no version",
        "no version, swapped",
        "Unsloth",
        "other word",
        "between releases",
        "no number",
        "swapped later",
        "not before",
    ],
)
def test_an_order_that_is_not_declared_is_refused(
    layout: str, settings: dict[str, Any], message: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    refused(rewritten(adapter, tmp_path / "foreign", layout, **settings), base, message)


@pytest.mark.parametrize(
    ("layout", "asked", "settings", "message"),
    [
        (
            "peft",
            "peft-0.18",
            {"peft_version": None},
            r"--layout contradicts the file; got peft-0.18; leave --layout out, or give peft \(",
        ),
        (
            "peft-0.18",
            "expert-major",
            {"peft_version": None},
            "--layout contradicts the file; got expert-major;",
        ),
        (
            "peft",
            "expert-major",
            {"lora_B_layout": "rank_major"},
            r"--layout contradicts the file; got expert-major; leave --layout out, or give peft \(",
        ),
        ("peft", "peft-0.18", {"peft_version": "0.21.2"}, "--layout contradicts the file; got peft-0.18"),
    ],
)
def test_an_order_that_the_file_contradicts_is_refused(
    layout: str, asked: str, settings: dict[str, Any], message: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    refused(rewritten(adapter, tmp_path / "foreign", layout, **settings), base, message, asked)


def test_a_recorded_order_is_not_overruled(adapter: Path, base: Path) -> None:
    merge(adapter, adapter.parent / "declared", layouts=["peft"], show_progress=False)
    message = "recorded in finetune.json, and it is peft; got expert-major; leave --layout out"
    refused(adapter, base, message, "expert-major")


def test_layouts_and_adapters_must_be_as_many(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"number of layouts differs .* got 2 for 1 adapters; give one"):
        merge(adapter, tmp_path / "out", layouts=["peft", "peft"], show_progress=False)


def test_an_order_of_nothing_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    refused(adapter, base, r"--layout: no adapter has LoRA on stacked experts, .* got peft; leave it out", "peft")


# Where inputs and outputs of every stack are equally many, the shapes say nothing of their places.


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gate and up together have as many rows as columns, 64; only that stack is adapted."""
    base = save_tiny("olmoe", tmp_path_factory.mktemp("square"), intermediate_size=32)
    stack = "mlp.experts.gate_up_proj"
    return save_adapter(base, base / "adapter", r=3, target_modules=["q_proj"], target_parameters=[stack])


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_square_stacks_come_to_the_same_when_asked(layout: str, square: Path, tmp_path: Path) -> None:
    merge(square, tmp_path / "ours", show_progress=False)
    foreign = rewritten(square, tmp_path / "foreign", layout, peft_version=None)
    merge(foreign, tmp_path / "out", base=square.parent, layouts=[layout], show_progress=False)
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "out")
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, msg=key)


def test_square_stacks_of_unknown_origin_are_refused_with_every_choice(square: Path, tmp_path: Path) -> None:
    foreign = rewritten(square, tmp_path / "foreign", "peft", peft_version=None)
    choices = r"--layout: peft \(.*\), peft-0.18 \(.*\), expert-major \(.*\), expert-major-0.18 \("
    refused(foreign, square.parent, choices)


@pytest.mark.parametrize(("version", "layout"), [("0.18.0", "peft-0.18"), ("0.19.0", "peft")])
def test_the_version_tells_inputs_and_outputs_of_square_stacks(
    version: str, layout: str, square: Path, tmp_path: Path
) -> None:
    merge(square, tmp_path / "ours", show_progress=False)
    foreign = rewritten(square, tmp_path / "foreign", layout, peft_version=version)
    merge(foreign, tmp_path / "out", base=square.parent, show_progress=False)
    for key, value in tensors(tmp_path / "ours").items():
        torch.testing.assert_close(tensors(tmp_path / "out")[key], value, msg=key)


def test_stacks_that_are_multiplied_from_the_right_were_never_swapped(tmp_path: Path) -> None:
    base = save_tiny("gpt_oss", tmp_path / "base")
    adapter = adapter_on_all(base, tmp_path / "adapter")
    merge(adapter, tmp_path / "ours", show_progress=False)
    for number, version in enumerate(("0.18.1", None)):
        foreign = rewritten(adapter, tmp_path / f"foreign{number}", "peft", peft_version=version)
        asked = None if number == 0 else ["peft-0.18"]
        merge(foreign, tmp_path / f"out{number}", base=base, layouts=asked, show_progress=False)
        for key, value in tensors(tmp_path / "ours").items():
            torch.testing.assert_close(tensors(tmp_path / f"out{number}")[key], value, msg=key)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_proof_sees_an_order_that_is_read_otherwise(
    layout: str, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = rewritten(adapter, tmp_path / "foreign", layout, peft_version=None)
    by_expert, contiguous = finetune.adapters.deltas.by_expert, finetune.adapters.deltas.contiguous_ranks
    monkeypatch.setattr(finetune.adapters.deltas, "by_expert", contiguous)
    monkeypatch.setattr(finetune.adapters.deltas, "contiguous_ranks", by_expert)
    refused(foreign, base, r"merged model differs from base \+ adapter", layout)
