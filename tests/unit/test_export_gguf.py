"""`finetune export --format gguf`: one file, whole or not there, and one line for what the converter does not take."""

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf import GGUFReader

from finetune.adapters.record import read_record
from finetune.checkpoint import CheckpointReader
from finetune.errors import WeightsError
from finetune.export import export, gguf
from finetune.merge import merge
from finetune.merge.report import report_card
from tests.support import save_tiny_mixtral, save_tiny_sentencepiece
from tests.unit.merge_adapters import save_adapter, tensors

TYPES = {"f16": 1, "q8_0": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_mixtral(tmp_path_factory.mktemp("mixtral"), vocab_size=128)
    save_tiny_sentencepiece(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter"))


def read(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(file).tensors}


def test_an_adapter_is_merged_and_proven_first(adapter: Path, tmp_path: Path) -> None:
    export(adapter, tmp_path / "model.gguf", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    merge(adapter, tmp_path / "merged", show_progress=False)
    wanted = tensors(tmp_path / "merged")
    found = read(tmp_path / "model.gguf")
    for expert in range(4):
        w2 = wanted[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"]
        assert torch.equal(torch.tensor(found["blk.1.ffn_down_exps.weight"].data[expert]), w2)


@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_the_number_format_can_be_chosen(base: Path, tmp_path: Path, outtype: str) -> None:
    export(base, tmp_path / "model.gguf", "gguf", outtype=outtype)
    assert read(tmp_path / "model.gguf")["blk.0.attn_output.weight"].tensor_type == TYPES[outtype]


def test_by_default_it_is_the_models_own(base: Path) -> None:
    assert gguf.own_type(CheckpointReader(base)) == "f32"


def test_a_merged_folder_with_its_card_is_taken(adapter: Path, tmp_path: Path) -> None:
    # The converter reads the card's front matter.
    report = merge(adapter, tmp_path / "merged", show_progress=False)
    card = report_card(report.as_dict(), [read_record(adapter).as_dict()], report.output)
    (tmp_path / "merged" / "README.md").write_text(card)
    export(tmp_path / "merged", tmp_path / "model.gguf", "gguf")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert "moe-finetune" in fields["general.tags"].contents()
    assert fields["general.base_model.0.name"].contents()


def test_what_the_converter_does_not_take_is_one_line_with_its_last_words(tmp_path: Path) -> None:
    base = save_tiny_mixtral(tmp_path / "base")  # its tokenizer is of no known kind
    with pytest.raises(WeightsError) as error:
        export(base, tmp_path / "model.gguf", "gguf")
    line = "cannot be converted to GGUF; got NotImplementedError: BPE pre-tokenizer was not recognized"
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_without_the_package_it_says_what_to_install(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "PACKAGE", "a-package-that-is-not-there")
    with pytest.raises(WeightsError, match=r'is not installed; install it: pip install "moe-finetune\[gguf\]"'):
        export(base, tmp_path / "model.gguf", "gguf")


def test_a_package_that_was_written_over_is_not_used(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = importlib.metadata.distribution(gguf.PACKAGE)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "constants.py").write_text("# of another package")
    files = [file for file in whole.files or () if str(file) == "gguf/constants.py"]
    assert files
    other = SimpleNamespace(files=files, locate_file=lambda file: tmp_path / str(file))
    monkeypatch.setattr(gguf, "distribution", lambda _: other)
    with pytest.raises(WeightsError, match=r"replaced by another package .*; got gguf/constants.py; pip install"):
        export(base, tmp_path / "model.gguf", "gguf")


def test_an_output_that_exists_is_left_alone(base: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(WeightsError, match="output exists; name a new file"):
        export(base, tmp_path / "model.gguf", "gguf")
    assert (tmp_path / "model.gguf").read_text() == "mine"


def test_what_is_neither_adapter_nor_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds neither config.json nor adapter_config.json; give a merged folder"):
        export(tmp_path, tmp_path / "model.gguf", "gguf")


def test_a_base_beside_a_whole_model_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="a full model has no base"):
        export(base, tmp_path / "model.gguf", "gguf", base=base)
    with pytest.raises(WeightsError, match="a full model has no LoRA factors; got peft"):
        export(base, tmp_path / "model.gguf", "gguf", layout="peft")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Traceback (most recent call last):\n  File x\nKeyError: 'rope'\n", "KeyError: 'rope'"),
        ("INFO: reading\rWriting: 3%\n", "Writing: 3%"),
        ("", "nothing"),
    ],
)
def test_last_words(text: str, words: str) -> None:
    assert gguf.last_words(text) == words
