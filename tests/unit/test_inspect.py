"""`finetune inspect`: what a folder is, made how, from what, for which base, and whether a merge can be proven."""

import json
import shutil
from pathlib import Path

import pytest

from finetune.checkpoint import fingerprint, write_sums
from finetune.cli.main import main
from finetune.errors import WeightsError
from finetune.inspect import inspect
from finetune.merge import merge
from tests.support import save_tiny_llama, save_tiny_mixtral
from tests.unit.merge_adapters import save_adapter

SCREEN = 40  # lines


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("mixtral"), dtype="bfloat16")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter"), b_std=0.3)


def said(folder: Path) -> dict[str, str]:
    """The lines by their names, those that are broken joined again."""
    lines: list[list[str]] = []
    text = inspect(folder)
    left = text.index("  ", max(len(line.split("  ")[0]) for line in text.splitlines() if line[0] != " "))
    for line in text.splitlines():
        name, rest = line[:left].strip(), line[left:].strip()
        if name:
            lines.append([name, rest])
        else:
            lines[-1][1] += f" {rest}"
    assert len(text.splitlines()) <= SCREEN
    return {name: rest for name, rest in reversed(lines)}  # noqa: C416


def test_an_adapter(base: Path, adapter: Path) -> None:
    told = said(adapter)
    assert told["what"] == "LoRA adapter, made by another tool with peft 0.21.2"
    assert told["base"] == f"{base}, fingerprint {fingerprint(base)[:12]}"
    assert told["LoRA"] == "r 4, lora_alpha 8"
    assert told["checksums"] == "no SHA256SUMS to check against"
    assert told["experts' factors"] == "A expert-major, B rank-major (PEFT's), recorded"
    assert told["merge"] == (
        f"can be proven: the base is here in {base}, and all factors fit it; 34 of its 41 tensors would change"
    )


def test_an_adapter_whose_base_is_not_here(adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    record = json.loads((copy / "finetune.json").read_text())
    record["base"]["name_or_path"] = "maker/away"
    (copy / "finetune.json").write_text(json.dumps(record))
    assert said(copy)["merge"].startswith("cannot be proven as things are: ")
    assert "the recorded base is not on this machine; got maker/away" in said(copy)["merge"]


def test_an_adapter_of_a_chain_says_what_it_was_trained_on(base: Path, adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    record = json.loads((copy / "finetune.json").read_text())
    source = {"base_fingerprint": "b" * 64, "into": "original", "adapters": [{"sha256": "a" * 64, "weight": 0.5}]}
    record["base"] |= {"made_from": source, "fingerprint": "c" * 64}
    (copy / "finetune.json").write_text(json.dumps(record))
    told = said(copy)
    assert told["base"] == f"{base}, fingerprint {'c' * 12}: merged from {'b' * 12} with {'a' * 12} x 0.5"
    assert "cannot be proven" in told["merge"]


def test_a_checkpoint(base: Path) -> None:
    told = said(base)
    assert told["what"] == "checkpoint of a mixtral: 2 layers of 64, 4 experts, top 2, vocabulary 512"
    assert told["weights"].startswith("41 tensors, 0.2 M values, BF16, ")
    assert told["fingerprint"] == fingerprint(base)
    assert told["made by"] == "not recorded; neither a merge nor an upcycling of this toolkit"
    assert told["training"] == "lora.targets: attention, experts, router"


def test_a_dense_checkpoint_has_no_experts(tmp_path: Path) -> None:
    assert said(save_tiny_llama(tmp_path / "base"))["what"] == "checkpoint of a llama: 2 layers of 64, vocabulary 512"


@pytest.mark.parametrize("prove", [True, False], ids=["proven", "not proven"])
def test_a_merged_checkpoint(base: Path, adapter: Path, tmp_path: Path, prove: bool) -> None:
    report = merge(adapter, tmp_path / "out", prove=prove, show_progress=False)
    told = said(tmp_path / "out")
    assert told["made by"] == f"finetune merge into the original base {base} ({fingerprint(base)[:12]})"
    assert told["adapter"] == f"1 x {adapter}, SHA-256 {report.adapters[0]['sha256'][:12]}"
    assert told["checksums"] == "every file is as it was written"
    assert "experts 24 tensors by " in told["changed"]
    assert told["proven"] == f"{report.proof.adapter_tensors} adapter tensors each used once, 41 tensors as in the base"
    assert ("logits" in told) == prove
    assert ("NOT PROVEN" in told) != prove


def test_a_report_of_other_weights_is_not_repeated(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "out", show_progress=False)
    shutil.copyfile(base / "model.safetensors", tmp_path / "out" / "model.safetensors")
    write_sums(tmp_path / "out")
    assert said(tmp_path / "out")["made by"].startswith("a merge; but merge-report.json is of weights ")


def test_a_damaged_folder_is_refused(adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "out", show_progress=False)
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"config.json: differs from its sum in SHA256SUMS"):
        inspect(tmp_path / "out")


def test_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert main(["inspect", str(tmp_path)]) == 1
    line = "is neither an adapter nor a checkpoint in safetensors nor a run; got notes.txt; give a run's output_dir"
    assert line in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "away")]) == 1
    assert "away: is not a folder; give a run's output_dir" in capsys.readouterr().err
