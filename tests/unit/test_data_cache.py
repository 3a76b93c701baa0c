"""The cache of prepared rows: an entry is whole or not there, and never used for something else."""

import signal
import subprocess
import sys
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import numpy as np
import pytest

from finetune.data.tokens.cache import cache_folder, digest, entry
from finetune.errors import DiskError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def writer(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "rows").write_text(text)

    return write


def never(folder: Path) -> None:
    raise AssertionError("written again")


def test_an_entry_is_written_once_and_found_again(folder: Path) -> None:
    assert entry("a", writer("one")) == folder / "a"
    assert (entry("a", never) / "rows").read_text() == "one"


def test_an_entry_appears_by_one_rename() -> None:
    written: list[int] = []
    found = entry("a", lambda folder: written.append(folder.stat().st_ino))
    assert [found.stat().st_ino] == written


def test_what_fails_leaves_nothing_behind(folder: Path) -> None:
    def fails(inside: Path) -> None:
        (inside / "rows").write_text("half")
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        entry("a", fails)
    assert list(folder.iterdir()) == []


def full(file: FileIO) -> None:
    file.write(b"rows")


def full_for_numpy(file: FileIO) -> None:
    np.zeros(1 << 16).tofile(file)  # says how many items were not written, and not why


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
@pytest.mark.parametrize("write", [full, full_for_numpy])
def test_a_full_disk_is_an_error_with_its_folder_and_what_to_do(write: Callable[[FileIO], None], folder: Path) -> None:
    def fills(inside: Path) -> None:
        with Path("/dev/full").open("wb", buffering=0) as file:
            write(file)

    with pytest.raises(DiskError) as caught:
        entry("a", fills)
    [problem] = caught.value.problems
    assert (problem.where, problem.what) == (str(folder), "the disk is full")
    assert problem.do.endswith(", or set FINETUNE_CACHE to a folder on another disk")
    assert list(folder.iterdir()) == []


def test_two_writers_at_once_keep_one_result() -> None:
    def meanwhile(inside: Path) -> None:
        (inside / "rows").write_text("mine")
        # Another process with the same work is done first.
        code = "from finetune.data.tokens.cache import entry; entry('a', lambda f: (f / 'rows').write_text('theirs'))"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

    assert (entry("a", meanwhile) / "rows").read_text() == "theirs"


def test_a_killed_writer_leaves_no_entry_and_the_next_one_clears_up(folder: Path) -> None:
    code = (
        "import time\n"
        "from finetune.data.tokens.cache import entry\n"
        "def write(folder):\n"
        "    (folder / 'rows').write_text('half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "entry('a', write)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    [begun] = folder.iterdir()
    # One that is alive is left alone.
    entry("b", writer("other"))
    assert begun.is_dir()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (entry("a", writer("whole")) / "rows").read_text() == "whole"
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]


def test_the_name_depends_on_every_part_and_not_on_their_order() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert len({digest({"a": 1, "b": 2}), digest({"a": 2, "b": 1}), digest({"a": 1})}) == 3


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    assert cache_folder() == folder
    monkeypatch.delenv("FINETUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/moe-finetune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/a/user")
    assert cache_folder() == Path("/a/user/.cache/moe-finetune")
