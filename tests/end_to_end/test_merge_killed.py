"""A merge that is killed, meets a full disk or another merge: nothing that looks whole and is not; and it can go on."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.checkpoint import SUMS_FILE, CheckpointWriter, verify_sums
from finetune.errors import WeightsError
from finetune.merge import merge
from finetune.merge.journal import JOURNAL_FILE, Journal
from tests.support import save_tiny_mixtral
from tests.unit.merge_adapters import save_adapter

KILLS = 20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 MB in 16 bits, so that a kill can arrive while the weights are being written."""
    folder = tmp_path_factory.mktemp("base")
    return save_tiny_mixtral(folder, "bfloat16", hidden_size=512, intermediate_size=4096)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter"), b_std=0.3)


@pytest.fixture(scope="module")
def whole(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted merge writes."""
    folder = tmp_path_factory.mktemp("whole") / "merged"
    merge(adapter, folder, show_progress=False)
    return folder


class Merges:
    """Merges that start at once (`merge_server.py`), each of which may be killed."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        words = [sys.executable, "-m", "tests.end_to_end.merge_server"]
        self.server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, *words: object, kill_after: float | None = None) -> int:
        """The exit code; minus the signal of one that was killed."""
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps([str(self.log), "merge", *map(str, words)]) + "\n")
        self.server.stdin.flush()
        child = self._line()
        if kill_after is not None:
            threading.Timer(kill_after, _kill, [child]).start()
        return self._line()

    def _line(self) -> int:
        assert self.server.stdout is not None
        return int(self.server.stdout.readline())


def _kill(process: int) -> None:
    with suppress(ProcessLookupError):  # it was faster
        os.kill(process, signal.SIGKILL)


@pytest.fixture
def merges(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Merges]:
    merges = Merges(tmp_path_factory.mktemp("log"))
    yield merges
    merges.server.kill()
    merges.server.wait()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, but for the report, in which times stand, and the list that has its sum."""
    names = {file.name: file.read_bytes() for file in folder.iterdir()}
    return {name: value for name, value in names.items() if name not in ("merge-report.json", SUMS_FILE)}


def timed(merges: Merges, adapter: Path, output: Path) -> float:
    """Seconds of a merge that nobody kills."""
    started = time.monotonic()
    assert merges.run(adapter, "--output", output) == 0, merges.log.read_text()
    return time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("resume", [(), ("--resume",)], ids=["begun anew", "resumed"])
def test_kills_at_random_moments_leave_nothing_that_looks_whole(
    adapter: Path, whole: Path, merges: Merges, tmp_path: Path, resume: tuple[str, ...]
) -> None:
    output, partial = tmp_path / "merged", tmp_path / ".merged.partial"
    words = (adapter, "--output", output, *resume)
    lasted = min(timed(merges, adapter, tmp_path / name) for name in ("first", "second"))
    moments = random.Random(0)
    killed = 0
    for _ in range(KILLS // 2):
        code = merges.run(*words, kill_after=moments.uniform(0, lasted))
        if code == 0:  # it was faster than the kill
            assert contents(output) == contents(whole)
            subprocess.run(["rm", "-r", str(output)], check=True)
            continue
        assert code == -signal.SIGKILL
        killed += 1
        assert not output.exists()
        assert not (partial / "config.json").exists() or (partial / SUMS_FILE).exists()
    assert killed >= KILLS // 4
    assert merges.run(*words) == 0, merges.log.read_text()
    assert contents(output) == contents(whole)
    assert verify_sums(output)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["first", "merged", "second"]


def test_what_was_written_before_a_kill_is_not_written_again(
    adapter: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, partial = tmp_path / "merged", tmp_path / ".merged.partial"
    monkeypatch.setattr("finetune.merge.stream.BYTES_BETWEEN_ENTRIES", 2**24)

    add, calls = Journal.add, iter(range(100))

    def interrupted(self: Journal, entries: Any) -> None:
        add(self, entries)
        if next(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge(adapter, output, show_progress=False)
    assert not output.exists()
    done = [key for line in (partial / JOURNAL_FILE).read_text().splitlines()[1:] for key in json.loads(line)]
    assert len(done) > 5
    written: list[str] = []
    write_rows = CheckpointWriter.write_rows

    def noted(self: CheckpointWriter, key: str, start: int, rows: torch.Tensor) -> None:
        written.append(key)
        write_rows(self, key, start, rows)

    monkeypatch.setattr(CheckpointWriter, "write_rows", noted)
    merge(adapter, output, resume=True, show_progress=False)
    assert written
    assert not set(written) & set(done)
    assert contents(output) == contents(whole)


def test_an_unfinished_merge_of_something_else_is_not_gone_on_with(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "merged"

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("finetune.merge.copy_files", interrupt)
        with pytest.raises(KeyboardInterrupt):
            merge(adapter, output, show_progress=False)
    with pytest.raises(WeightsError, match="the unfinished merge there is another one; got another adapters; give the"):
        merge(adapter, output, weights=[0.5], resume=True, show_progress=False)
    with pytest.raises(
        WeightsError, match="got another shards, tensors; give the same adapters, base and options, or leave out"
    ):
        merge(adapter, output, dtype="float32", resume=True, show_progress=False)
    merge(adapter, output, dtype="float32", show_progress=False)
    assert verify_sums(output)


def test_a_second_merge_into_the_same_folder_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "finetune.cli.main", "merge", str(adapter), "--output", str(tmp_path / "merged")]
    pair = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate() for process in pair]
    codes = [process.returncode for process in pair]
    refusal = told[codes.index(1)][1] if sorted(codes) == [0, 1] else told
    assert "another process is writing this folder" in refusal or "output folder is not empty" in refusal
    assert verify_sums(tmp_path / "merged")
    assert [file.name for file in tmp_path.iterdir()] == ["merged"]


FILLED_MEANWHILE = """
mount -t tmpfs -o size=110m tmpfs "$1" || exit 77
"$2" -m finetune.cli.main merge "$3" --output "$1/merged" > "$4" 2>&1 &
while [ ! -s "$1/.merged.partial/model.safetensors" ]; do sleep 0.01; kill -0 $! || break; done
dd if=/dev/zero of="$1/filler" bs=64k 2> /dev/null
wait $!
echo "$?" $(ls -A "$1")
"""


def test_another_disk_that_fills_up_meanwhile(adapter: Path, tmp_path: Path) -> None:
    """A disk of its own in memory: 10 MB more than the weights take, which something else then writes full."""
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    words = ["unshare", "-Urm", "sh", "-c", FILLED_MEANWHILE, "sh", str(disk), sys.executable, str(adapter), str(log)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no disk of one's own here: {done.stderr.strip()}")
    assert done.stdout.split() == ["1", "filler"], log.read_text()
    # In the files beside the weights or, where the other was faster, in reserving their space.
    full = "the disk is full; free space, or write to another disk"
    assert full in log.read_text() or "0.10 GiB cannot be reserved; got No space left on device" in log.read_text()
    assert "Traceback" not in log.read_text()
