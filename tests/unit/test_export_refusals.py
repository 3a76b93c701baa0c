"""What an export does not take, and what it does not ask for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import WeightsError
from finetune.export import export
from tests.support import save_tiny_mixtral
from tests.unit.merge_adapters import save_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_adapter(base, tmp_path / "adapter")


def refused(adapter: Path, form: str, message: str, **options: Any) -> None:
    with pytest.raises(WeightsError, match=message):
        export(adapter, adapter.parent / "out", form, **options)
    assert [path.name for path in adapter.parent.iterdir() if "out" in path.name] == []


@pytest.mark.parametrize("form", ["peft", "vllm"])
def test_factors_that_are_not_finite(adapter: Path, form: str) -> None:
    file = adapter / "adapter_model.safetensors"
    factors = load_file(file)
    factors[next(iter(factors))][0, 0] = torch.nan
    save_file(factors, file, metadata={"format": "pt"})
    refused(adapter, form, "adapter_model.safetensors: .*: not finite; train again, or take an earlier checkpoint")


@pytest.mark.parametrize("options", [{"base": Path("elsewhere")}, {"layout": "peft"}])
def test_a_copy_needs_no_base_and_no_layout(adapter: Path, options: dict[str, Any]) -> None:
    refused(adapter, "peft", "has no effect on a copy of the adapter; leave it out", **options)
