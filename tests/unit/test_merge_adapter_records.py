"""Adapter folders whose record or files do not fit: each is refused with the file and what it holds."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import WeightsError
from finetune.merge import merge
from tests.support import save_tiny_mixtral
from tests.unit.merge_adapters import save_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def sound(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def adapter(sound: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(sound, tmp_path / "adapter")


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_an_adapter_is_not_added_to_one_that_went_on_from_it(adapter: Path, base: Path, tmp_path: Path) -> None:
    later = save_adapter(base, tmp_path / "later", b_std=0.04)
    report = merge(adapter, tmp_path / "first", show_progress=False)
    edit(later / "finetune.json", adapter={"name_or_path": "x", "sha256": report.adapters[0]["sha256"]})
    message = "continues another of the adapters and already contains its change; got .*; name only the later one"
    with pytest.raises(WeightsError, match=message):
        merge([adapter, later], tmp_path / "out", show_progress=False)


def test_a_trainers_checkpoint_with_moved_biases(adapter: Path, tmp_path: Path) -> None:
    (adapter / "trainer_state.json").write_text("{}")
    (adapter / "router_balance.json").write_text(json.dumps({"frequency": [[1.0]], "bias": {"x": [1.0]}}))
    with pytest.raises(WeightsError, match="is a state of training, and its moved router biases are not among the fac"):
        merge(adapter, tmp_path / "out", show_progress=False)


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("adapter_config.json", {"rank_pattern": {"q_proj": "x"}}),
        ("adapter_config.json", {"rank_pattern": ["q_proj"]}),
        ("adapter_config.json", {"alpha_pattern": {"q_proj": None}}),
        ("adapter_config.json", {"target_modules": 3}),
        ("adapter_config.json", {"trainable_token_indices": "abc"}),
        ("adapter_config.json", {"lora_alpha": float("nan")}),
        ("finetune.json", {"base": "x"}),
        ("finetune.json", {"base": {"name_or_path": 5}}),
        ("finetune.json", {"layout": "x"}),
        ("finetune.json", {"added_tokens": {"a": "b"}}),
        ("finetune.json", {"recipe": {"method": None}}),
    ],
)
def test_values_of_a_wrong_type_are_refused(
    adapter: Path, base: Path, tmp_path: Path, file: str, values: dict[str, Any]
) -> None:
    edit(adapter / file, **values)
    where = next(iter(values))
    with pytest.raises(
        WeightsError, match=rf"{file}: {where}.*has the wrong type \(expected .*\); got .*; fetch or copy"
    ):
        merge(adapter, tmp_path / "out", base=base, show_progress=False)


def test_a_tokenizer_that_is_none(adapter: Path, base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsError, match=r"base: its tokenizer cannot be read; got .*; fetch or copy the file again"):
        merge(adapter, tmp_path / "out", base=copy, show_progress=False)
