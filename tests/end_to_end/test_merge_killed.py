"""A merge that is killed, meets a full disk or another merge leaves nothing that looks like a model."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from finetune.checkpoint import SUMS_FILE, verify_sums
from finetune.errors import WeightsError
from finetune.merge import merge
from finetune.merge.report import TIMES_FILE
from tests.support import save_tiny_mixtral
from tests.unit.merge_adapters import save_adapter

RANDOM_KILLS = 4


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On a base of 26 MB in 16 bits, so that a kill can arrive while the weights are being written."""
    base = save_tiny_mixtral(tmp_path_factory.mktemp("base"), "bfloat16", hidden_size=256, intermediate_size=2048)
    return save_adapter(base, tmp_path_factory.mktemp("adapter"), b_std=0.3)


class Merges:
    """Merges that start at once (`merge_server.py`), one after the other."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        words = [sys.executable, "-m", "tests.end_to_end.merge_server"]
        self.server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, *words: object) -> int:
        """The number of the process that merges."""
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps([str(self.log), "merge", *map(str, words)]) + "\n")
        self.server.stdin.flush()
        return self._line()

    def wait(self) -> int:
        """The exit code of the running merge; minus the signal of one that was killed."""
        return self._line()

    def _line(self) -> int:
        assert self.server.stdout is not None
        return int(self.server.stdout.readline())


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Merges]:
    merges = Merges(tmp_path_factory.mktemp("log"))
    yield merges
    merges.server.kill()
    merges.server.wait()


@pytest.fixture(scope="module")
def whole(adapter: Path, merges: Merges, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """What an uninterrupted merge writes, and its seconds."""
    output, started = tmp_path_factory.mktemp("whole") / "merged", time.monotonic()
    merges.start(adapter, "--output", output)
    assert merges.wait() == 0, merges.log.read_text()
    return output, time.monotonic() - started


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, the list of checksums among them, except that of the times."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != TIMES_FILE}


def made_since(path: Path, started: float) -> bool:
    """Whether `path` exists and was made after `started`: not left by an earlier kill."""
    try:
        return path.stat().st_ctime > started
    except FileNotFoundError:
        return False


def kill_when(moment: Callable[[], bool], merges: Merges, *words: object) -> bool:
    """Start a merge and SIGKILL it as soon as `moment` is true; False where it ended before."""
    process = merges.start(*words)
    while not moment():
        time.sleep(0.001)
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    code = merges.wait()
    assert code in (0, -signal.SIGKILL), merges.log.read_text()
    return code != 0


@pytest.mark.slow
def test_kills_leave_nothing_that_looks_whole_and_the_next_start_cleans_up(
    adapter: Path, whole: tuple[Path, float], merges: Merges, tmp_path: Path
) -> None:
    output, partial = tmp_path / "merged", tmp_path / ".merged.partial"
    words = (adapter, "--output", output)
    # The folder was made; the weights have begun; the weights are whole and the proof is running.
    moments: list[Path | float] = [partial, partial / "model.safetensors", partial / "tokenizer.json"]
    moments += [random.Random(0).uniform(0, 0.8) * whole[1] for _ in range(RANDOM_KILLS)]
    for moment in moments:
        started, clock = time.time(), time.monotonic()
        if isinstance(moment, Path):
            assert kill_when(lambda: made_since(moment, started), merges, *words)  # noqa: B023
            assert partial.is_dir()
        elif not kill_when(lambda: time.monotonic() - clock > moment, merges, *words):  # noqa: B023
            shutil.rmtree(output)
        assert not output.exists()
        assert not (partial / "config.json").exists() or (partial / SUMS_FILE).exists()
    partial.mkdir(exist_ok=True)
    (partial / "left by a kill").write_text("half")
    (tmp_path / ".merged.lock").touch()
    merges.start(*words)
    assert merges.wait() == 0, merges.log.read_text()
    assert contents(output) == contents(whole[0])
    assert verify_sums(output)
    assert list(tmp_path.iterdir()) == [output]


def test_a_second_merge_into_the_same_folder_is_refused(adapter: Path, merges: Merges, tmp_path: Path) -> None:
    output, partial = tmp_path / "merged", tmp_path / ".merged.partial"
    first = merges.start(adapter, "--output", output)
    while not partial.exists():
        time.sleep(0.001)
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(WeightsError, match="merged: another process is writing this folder; wait for it, or name ano"):
        merge(adapter, output, show_progress=False)
    os.kill(first, signal.SIGCONT)
    assert merges.wait() == 0, merges.log.read_text()
    assert verify_sums(output)
    assert list(tmp_path.iterdir()) == [output]


FILLED_MEANWHILE = """
mount -t tmpfs -o size="$5" tmpfs "$1" || exit 77
"$2" -m finetune.cli.main merge "$3" --output "$1/merged" > "$4" 2>&1 &
while [ ! -s "$1/.merged.partial/model.safetensors" ]; do sleep 0.01; kill -0 $! || break; done
dd if=/dev/zero of="$1/filler" bs=64k 2> /dev/null
wait $!
echo "$?" $(ls -A "$1")
"""


def test_another_disk_that_fills_up_meanwhile(adapter: Path, whole: tuple[Path, float], tmp_path: Path) -> None:
    """A disk of its own in memory: 10 MB more than the weights take, which something else then writes full."""
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    size = (whole[0] / "model.safetensors").stat().st_size + 10 * 2**20
    words = [str(disk), sys.executable, str(adapter), str(log), str(size)]
    words = ["unshare", "-Urm", "sh", "-c", FILLED_MEANWHILE, "sh", *words]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no disk of one's own here: {done.stderr.strip()}")
    assert done.stdout.split() == ["1", "filler"], log.read_text()
    # In the files beside the weights or, where the other was faster, in reserving their space.
    assert "make room on it" in log.read_text()
    assert "are needed; got" in log.read_text()
    assert "Traceback" not in log.read_text()
