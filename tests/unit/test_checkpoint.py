"""The checkpoint room: what it reads, what it writes, what it refuses, and folders that appear whole or not at all."""

import json
import multiprocessing
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.checkpoint import (
    CheckpointReader,
    CheckpointWriter,
    TensorSpec,
    fingerprint,
    new_folder,
)
from finetune.checkpoint.reader import DISK_DTYPES
from finetune.errors import DiskError, WeightsError
from finetune.files import require_free_disk

TENSORS = {
    "wide": torch.randn(5, 7),
    "half": torch.randn(3, 4, 2).to(torch.bfloat16),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
    "flags": torch.tensor([True, False, True]),
}


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(key, DISK_DTYPES[value.dtype], tuple(value.shape)) for key, value in tensors.items()]


def write(folder: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int = 2**31) -> Path:
    with CheckpointWriter(folder, specs_of(tensors), max_shard_bytes) as writer:
        for key in reversed(tensors):
            writer.write(key, tensors[key])
    return folder


@pytest.mark.parametrize(("max_shard_bytes", "files"), [(2**31, 1), (50, 3)])
def test_what_is_written_is_read_by_us_and_by_safetensors(tmp_path: Path, max_shard_bytes: int, files: int) -> None:
    reader = CheckpointReader(write(tmp_path, TENSORS, max_shard_bytes))
    shards = sorted(tmp_path.glob("*.safetensors"))
    stock = {key: value for shard in shards for key, value in load_file(shard).items()}
    assert len(shards) == files
    assert set(reader.keys) == set(stock) == set(TENSORS)
    for key, value in TENSORS.items():
        assert reader.read(key).dtype == stock[key].dtype == value.dtype
        assert torch.equal(reader.read(key), value)
        assert torch.equal(stock[key], value)


def test_one_shard_has_the_plain_name_and_several_have_an_index(tmp_path: Path) -> None:
    write(tmp_path / "one", TENSORS)
    write(tmp_path / "many", TENSORS, max_shard_bytes=100)
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(TENSORS)
    assert index["metadata"]["total_size"] == sum(value.numel() * value.itemsize for value in TENSORS.values())


def test_rows_are_read_and_written_alone(tmp_path: Path) -> None:
    value = TENSORS["half"]
    rows = value.flatten(0, 1)  # those of a stack are its matrices' rows, one after the other
    with CheckpointWriter(tmp_path, specs_of({"half": value})) as writer:
        writer.write_rows("half", 7, rows[7:])
        writer.write_rows("half", 0, rows[:7])
    reader = CheckpointReader(tmp_path)
    assert torch.equal(reader.read("half"), value)
    assert torch.equal(reader.read_rows("half", 1, 9), rows[1:9])


def test_a_tensor_read_from_safetensors_own_file_knows_its_place(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    info = CheckpointReader(tmp_path).info("wide")
    raw = info.file.read_bytes()[info.offset : info.offset + info.nbytes]
    assert (info.dtype, info.shape, info.nbytes) == ("F32", (5, 7), 140)
    assert raw == TENSORS["wide"].numpy().tobytes()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.write("other", torch.zeros(1)), "other: tensor was not announced"),
        (lambda w: w.write("a", torch.zeros(3)), r"a: shape differs .* got \[3\]; write \[2\]"),
        (
            lambda w: w.write("a", torch.zeros(2, dtype=torch.float16)),
            "a: dtype differs .* got torch.float16; write F32",
        ),
        (lambda w: [w.write("a", torch.zeros(2)) for _ in range(2)], "a: tensor is written twice"),
        (lambda w: w.write_rows("a", 1, torch.zeros(2)), r"a: rows do not fit .* got \[2\] at row 1"),
        (lambda w: None, "2 tensors were not written; got a, b"),
    ],
)
def test_the_writer_refuses(tmp_path: Path, spoil: object, message: str) -> None:
    specs = [TensorSpec("a", "F32", (2,)), TensorSpec("b", "F32", (1,))]
    with pytest.raises(WeightsError, match=message), CheckpointWriter(tmp_path, specs) as writer:
        spoil(writer)  # type: ignore[operator]


def test_the_writer_refuses_a_key_announced_twice(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="announced twice"):
        CheckpointWriter(tmp_path, [TensorSpec("a", "F32", (2,))] * 2)


def header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc", "header is truncated or not safetensors"),
        (struct.pack("<Q", 500) + b"{}", "header is truncated"),
        (header(b"{nonsense"), "header cannot be read"),
        (header(b"[1]"), "header is not a JSON object"),
        (header(b'{"a":{"dtype":"F32","shape":[2]}}'), "a: malformed header entry"),
        (
            header(b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}', b"1"),
            "a: unsupported dtype; got F4",
        ),
        (header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"1234"), "a: bytes do not fit the shape"),
        (header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"1234"), "a: file is truncated"),
    ],
)
def test_the_reader_refuses_a_broken_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "a\\b.safetensors", "model.bin"])
def test_the_index_may_only_name_safetensors_files_beside_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightsError, match="names a shard outside the folder or of another kind"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"wide": "model-1.safetensors"}}', "shard is missing"),
        ('{"weight_map": {"unknown": "here.safetensors"}}', "lacks a tensor that the index lists; got unknown"),
        ('{"weight_map": {}}', "has no weight_map"),
        ("[]", "must hold a JSON object"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_the_reader_refuses_a_wrong_index(tmp_path: Path, index: str, message: str) -> None:
    save_file(TENSORS, tmp_path / "here.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match=message):
        CheckpointReader(tmp_path)


def test_the_reader_refuses_pickles_empty_folders_and_unknown_keys(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds neither model.safetensors nor"):
        CheckpointReader(tmp_path)
    with pytest.raises(WeightsError, match="is not a folder"):
        CheckpointReader(tmp_path / "nowhere")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"holds no safetensors weights; got pytorch_model.bin; convert"):
        CheckpointReader(tmp_path)
    with pytest.raises(WeightsError, match="has no such tensor; got b"):
        CheckpointReader(write(tmp_path / "some", {"a": torch.zeros(1)})).info("b")


def test_the_fingerprint_follows_the_weights_and_not_their_sharding(tmp_path: Path) -> None:
    tensors = TENSORS | {"long": torch.randn(400, 400)}
    changed = tensors | {"long": tensors["long"] * 1.01}
    renamed = {("other" if key == "wide" else key): value for key, value in tensors.items()}
    one = fingerprint(write(tmp_path / "one", tensors))
    assert one == fingerprint(write(tmp_path / "many", tensors, max_shard_bytes=100))
    assert one != fingerprint(write(tmp_path / "changed", changed))
    assert one != fingerprint(write(tmp_path / "renamed", renamed))


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with pytest.raises(FileNotFoundError), new_folder(target) as folder:
        (folder / "file").rename(folder / "missing" / "file")
    assert list(target.parent.iterdir()) == []
    with new_folder(target) as folder:
        (folder / "file").write_text("whole")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert (target / "file").read_text() == "whole"


def test_a_new_folder_may_replace_an_empty_one_but_never_a_filled_one(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with new_folder(target) as folder:
        (folder / "file").write_text("mine")
    with pytest.raises(WeightsError, match="output folder is not empty; got file"), new_folder(target):
        pass
    with pytest.raises(WeightsError, match="output exists and is not a folder"), new_folder(target / "file"):
        pass
    assert (target / "file").read_text() == "mine"


def _die_in_new_folder(target: Path) -> None:
    with new_folder(target) as folder:
        (folder / "file").write_text("half")
        os._exit(9)


def test_what_a_dead_process_left_is_cleaned_and_a_live_one_is_respected(tmp_path: Path) -> None:
    target = tmp_path / "target"
    process = multiprocessing.get_context("spawn").Process(target=_die_in_new_folder, args=(target,))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert (tmp_path / ".target.partial" / "file").exists()
    with new_folder(target) as folder:
        assert list(folder.iterdir()) == []
        with pytest.raises(WeightsError, match="another process is writing this folder"), new_folder(target):
            pass
        assert folder.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_folder_that_no_killed_run_left_is_not_removed(tmp_path: Path) -> None:
    blocking = tmp_path / ".target.partial"
    blocking.mkdir()
    (blocking / "thesis.txt").write_text("years")
    message = "no killed run has left .* blocks the temporary output folder; got thesis.txt; remove it yourself"
    for _ in range(2):  # the refusal does not mark it either
        with pytest.raises(WeightsError, match=message), new_folder(tmp_path / "target"):
            pass
    assert (blocking / "thesis.txt").read_text() == "years"
    assert list(tmp_path.iterdir()) == [blocking]


def test_a_link_in_place_of_the_temporary_folder_is_refused(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    (tmp_path / ".target.partial").symlink_to(precious)
    message = "a file or link blocks the temporary output folder; remove it yourself, or name another output"
    with pytest.raises(WeightsError, match=message), new_folder(tmp_path / "target"):
        pass
    assert (precious / "thesis.txt").read_text() == "years"


def test_too_little_disk_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    require_free_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(
        DiskError, match=r"not/yet: there is not enough space .*: 1048576.00 GiB are needed; got .* GiB free"
    ):
        require_free_disk(tmp_path / "not" / "yet", 2**50)
    assert list(tmp_path.iterdir()) == []
