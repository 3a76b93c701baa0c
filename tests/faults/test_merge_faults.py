"""A merge that is killed, meets a full disk or another merge leaves nothing that looks like a model."""

import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from finetune.checkpoint import SUMS_FILE, verify_sums
from finetune.merge.report import TIMES_FILE
from tests.faults.harness import (
    Commands,
    assert_same_files,
    disk_of,
    files_of,
    kill_at,
    randomness,
    some_short,
    succeed,
    wait_for,
)
from tests.support import save_tiny_mixtral
from tests.unit.merge_adapters import save_adapter

KILLS = 10
TIMES = (TIMES_FILE,)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On a base of 26 MB in 16 bits, so that a kill can arrive while the weights are being written."""
    base = save_tiny_mixtral(tmp_path_factory.mktemp("base"), "bfloat16", hidden_size=256, intermediate_size=2048)
    return save_adapter(base, tmp_path_factory.mktemp("adapter"), b_std=0.3)


@pytest.fixture(scope="module")
def whole(adapter: Path, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """What an uninterrupted merge writes, and its seconds once everything is imported."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("first", "merged"):
        done = succeed(commands.run(folder, "merge", adapter, "--output", name))
    return folder / "merged", done.seconds


def assert_nothing_looks_whole(folder: Path) -> None:
    partial = folder / ".merged.partial"
    assert not (folder / "merged").exists()
    assert not (partial / "config.json").exists() or (partial / SUMS_FILE).exists()


def assert_the_next_start_is_whole(folder: Path, adapter: Path, whole: Path, commands: Commands, how: str) -> None:
    succeed(commands.run(folder, "merge", adapter, "--output", "merged"))
    assert_same_files(files_of(folder / "merged", TIMES), files_of(whole, TIMES), how)
    assert verify_sums(folder / "merged")
    assert [path.name for path in folder.iterdir()] == ["merged"]


@pytest.mark.parametrize("number", some_short(range(KILLS), 2))
def test_a_kill_at_any_moment(
    number: int, adapter: Path, whole: tuple[Path, float], commands: Commands, tmp_path: Path
) -> None:
    moment = randomness(f"merge {number}").uniform(0, 0.9) * whole[1]
    kill_at(commands.start(tmp_path, "merge", adapter, "--output", "merged"), moment)
    if (tmp_path / "merged").exists():  # it came after the end of the work
        assert_same_files(files_of(tmp_path / "merged", TIMES), files_of(whole[0], TIMES), f"after {moment:.3f} s")
        shutil.rmtree(tmp_path / "merged")
    assert_nothing_looks_whole(tmp_path)
    assert_the_next_start_is_whole(tmp_path, adapter, whole[0], commands, f"killed after {moment:.3f} s")


def made_since(path: Path, started: float) -> bool:
    """Whether `path` exists and was made after `started`: not left by an earlier kill."""
    try:
        return path.stat().st_ctime > started
    except FileNotFoundError:
        return False


def kill_when(moment: Callable[[], bool], commands: Commands, folder: Path, *words: object) -> None:
    running = commands.start(folder, *words)
    assert wait_for(moment, running)
    running.kill()
    assert running.wait().code == -signal.SIGKILL


def test_one_kill_after_the_other_at_the_moments_that_matter(
    adapter: Path, whole: tuple[Path, float], commands: Commands, tmp_path: Path
) -> None:
    """The folder was made; the weights have begun; the weights are whole and the proof is running."""
    partial = tmp_path / ".merged.partial"
    for moment in (partial, partial / "model.safetensors", partial / "tokenizer.json"):
        started = time.time()
        words = ("merge", adapter, "--output", "merged")
        kill_when(lambda: made_since(moment, started), commands, tmp_path, *words)  # noqa: B023
        assert partial.is_dir()
        assert_nothing_looks_whole(tmp_path)
    (partial / "left by a kill").write_text("half")
    (tmp_path / ".merged.lock").touch()
    assert_the_next_start_is_whole(tmp_path, adapter, whole[0], commands, "killed three times")


def test_a_second_merge_into_the_same_folder_is_refused(
    adapter: Path, whole: tuple[Path, float], commands: Commands, tmp_path: Path
) -> None:
    partial = tmp_path / ".merged.partial"
    first = commands.start(tmp_path, "merge", adapter, "--output", "merged")
    assert wait_for(partial.exists, first)
    first.send(signal.SIGSTOP)
    second = commands.run(tmp_path, "merge", adapter, "--output", "merged")
    assert second.code == 1
    assert "merged: another process is writing this folder; wait for it, or name ano" in second.output
    first.send(signal.SIGCONT)
    succeed(first.wait())
    assert verify_sums(tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def fill(file: Path) -> None:
    """Write until the disk is full."""
    with file.open("wb", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(bytes(2**16))


def test_another_disk_that_fills_up_meanwhile(
    adapter: Path, whole: tuple[Path, float], commands: Commands, tmp_path: Path
) -> None:
    """A disk of its own in memory: 10 MB more than the weights take, which something else then writes full."""
    disk = tmp_path / "disk"
    try:
        with disk_of(disk, (whole[0] / "model.safetensors").stat().st_size + 10 * 2**20) as resize:
            merging = commands.start(tmp_path, "merge", adapter, "--output", disk / "merged")
            weights = disk / ".merged.partial" / "model.safetensors"
            assert wait_for(lambda: weights.exists() and weights.stat().st_size > 0, merging)
            fill(disk / "filler")
            done = merging.wait()
            assert done.code == 1
            assert [path.name for path in disk.iterdir()] == ["filler"]
            assert "needed; got" in done.output, done.output
            assert str(disk) in done.output
            assert "Traceback" not in done.output
            (disk / "filler").unlink()
            resize(3 * (whole[0] / "model.safetensors").stat().st_size)
            succeed(commands.run(tmp_path, "merge", adapter, "--output", disk / "merged"))
            assert_same_files(files_of(disk / "merged", TIMES), files_of(whole[0], TIMES), "after a full disk")
    except PermissionError as error:
        pytest.skip(f"no disk of one's own here: {error}")
