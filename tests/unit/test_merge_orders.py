"""In which order a file holds its experts' factors: as declared, as the shapes say, or as asked; never guessed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune.cli.merge
from finetune.errors import WeightsError
from finetune.merge import LAYOUTS, merge
from tests.families import save_tiny
from tests.unit.merge_adapters import adapter_on_all, tensors

Tensors = dict[str, torch.Tensor]
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def rewritten(adapter: Path, folder: Path, layout: str, nested: bool = True, **settings: object) -> Path:
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
