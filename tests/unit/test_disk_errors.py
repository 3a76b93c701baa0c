"""A full, read-only, over-quota or failing disk is named whatever package met it: the path, needed and free bytes."""

import errno
import os
import resource
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from finetune.errors import DiskError, FinetuneError, Problem, as_expected, disk_problem, readable_size
from finetune.files import disk_named, require_free_disk, write_json, write_text

LIMIT = 4096  # bytes that a file may have here; every writer below wants more


@pytest.fixture
def limited() -> Iterator[None]:
    """Files of this process end after `LIMIT` bytes: what a full disk does, with another number, and for any user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def picture(path: Path) -> None:
    figure = Figure(figsize=(8, 8))
    FigureCanvasAgg(figure)
    figure.subplots().plot([1, 2])
    figure.savefig(path, format="png")


def arrow(path: Path) -> None:
    batch = pa.record_batch({"ids": pa.array(range(10_000))})
    with pa.ipc.new_stream(path, batch.schema) as stream:
        stream.write_batch(batch)


def vocabulary(path: Path) -> None:
    words = {f"word-{number}": number for number in range(2000)}
    Tokenizer(models.WordLevel(words, unk_token="word-0")).save(str(path))


def copy(path: Path) -> None:
    source = path.with_name("source")
    os.symlink("/proc/self/exe", source)
    shutil.copyfile(source, path)


WRITERS = {
    "text": lambda path: path.write_text("x" * 100_000),
    "safetensors": lambda path: save_file({"a": torch.zeros(100_000)}, path),
    "torch, by name": lambda path: torch.save(torch.zeros(100_000), path),
    "numpy": lambda path: np.save(path, np.zeros(100_000)),
    "pyarrow": arrow,
    "tokenizers": vocabulary,
    "matplotlib": picture,
    "a copy": copy,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_whatever_package_writes_the_error_names_the_path_and_the_bytes(
    writer: str, tmp_path: Path, limited: None
) -> None:
    path = tmp_path / "out"
    with pytest.raises(DiskError) as caught, disk_named(path, 500_000):
        WRITERS[writer](path)
    [problem] = caught.value.problems
    assert problem.where == str(path)
    assert "488.28 KiB are needed" in problem.what
    assert problem.got is not None
    assert problem.got.endswith("GiB free")
    assert "ulimit -f" in problem.do
    assert problem.do.endswith("or write to another disk")


def full(path: Path, number: int, needed: int | None = None) -> Problem:
    problem = disk_problem(OSError(number, os.strerror(number)), path, needed)
    assert problem is not None
    return problem


def test_each_way_in_which_a_disk_refuses_has_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3500))
    path = tmp_path / "not" / "yet"
    line = f"{path}: the disk is full: more than 3.42 KiB are needed; got 3.42 KiB free; free space on it, or write to"
    assert str(full(path, errno.ENOSPC)) == f"{line} another disk"
    what = "there is not enough space on the disk: 2.00 MiB are needed"
    assert full(path, errno.ENOSPC, 2 * 2**20).what == what
    assert full(path, errno.EDQUOT, 100).what == "your quota on this disk is used up: 100 bytes are needed"
    assert full(path, errno.EROFS, 100).what == "the disk is read-only"
    assert full(path, errno.EIO).what == "a disk fails while this is written (Input/output error)"
    assert full(path, errno.ESTALE).what == "a disk fails while this is written (Stale file handle)"
    assert full(path, errno.EACCES).what == "this user may not read or write it"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**30))
    assert "(a quota, a reserve or a limit" in full(path, errno.ENOSPC, 100).do, "what is needed is free"


def test_needed_and_free_bytes_never_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**30))
    with pytest.raises(DiskError, match=r"1073741825 bytes are needed; got 1073741824 bytes free"):
        require_free_disk(tmp_path, 2**30 + 1)
    sizes = [0, 1023, 1024, 10**6, 2**30]
    assert [readable_size(size) for size in sizes] == ["0 bytes", "1023 bytes", "1.00 KiB", "976.56 KiB", "1.00 GiB"]


def test_a_disk_without_room_for_one_more_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Disk:
        f_frsize, f_blocks, f_bfree, f_bavail = 4096, 100, 90, 90
        f_files, f_favail = 100, 0

    monkeypatch.setattr(os, "statvfs", lambda _: Disk)
    assert full(tmp_path, errno.ENOSPC).what == "the disk has no inode left for another file (see df -i)"


def unreadable() -> FinetuneError:
    """An error about something that is read while something else is written: it has its own name already."""
    error = FinetuneError(Problem("a.jsonl:1", "No space left on device", "mend the row"))
    error.__cause__ = OSError(errno.EIO, "Input/output error")
    return error


def test_errors_that_are_not_a_disk_s_stay_what_they_are(tmp_path: Path) -> None:
    others = [
        ValueError("row 3: 'No space left on device (os error 28)'"),
        KeyError("[Errno 28]"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", str(tmp_path)),
        unreadable(),
        sqlite3.OperationalError("no such table: seen"),
    ]
    for error in others:
        assert disk_problem(error, tmp_path) is None
        with pytest.raises(type(error)), disk_named(tmp_path):
            raise error


def without_reason() -> None:
    try:
        raise sqlite3.OperationalError("database or disk is full")
    except sqlite3.OperationalError as error:
        raise ConnectionError("the rows cannot be kept") from error


def test_the_reason_behind_another_error_is_found_and_the_first_name_is_kept(tmp_path: Path) -> None:
    with pytest.raises(DiskError) as caught, disk_named(tmp_path / "outer"), disk_named(tmp_path / "inner", 10):
        without_reason()
    assert caught.value.problems[0].where == str(tmp_path / "inner")
    assert as_expected(caught.value) is caught.value


def test_the_command_line_names_the_target_of_a_copy_and_not_its_source() -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/models/a", None, "/out/a")
    assert as_expected(error).problems[0].where == "/out/a"
    missing = as_expected(NotADirectoryError(errno.ENOTDIR, "Not a directory", "/out/a"))
    assert "cannot be accessed (Not a directory); check that its folder exists" in str(missing)
    with pytest.raises(ConnectionError):
        as_expected(ConnectionError("refused"))
    with pytest.raises(ZeroDivisionError):
        as_expected(ZeroDivisionError())


def test_a_text_that_does_not_fit_leaves_the_old_file_and_says_how_long_it_is(tmp_path: Path, limited: None) -> None:
    path = tmp_path / "audit.json"
    write_json(path, "old")
    with pytest.raises(DiskError, match=r"audit.json: the file would be larger .*: 9.77 KiB are needed; got .* free"):
        write_text(path, "x" * 10_000)
    assert path.read_text() == '"old"\n'
    assert list(tmp_path.iterdir()) == [path]
