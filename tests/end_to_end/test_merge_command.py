"""`finetune merge` as a user runs it, and as a machine kills it."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.merge import REPORT_FILE
from tests.support import save_tiny_mixtral
from tests.unit.merge_adapters import load, logits, save_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 MB in 16 bits, so that a kill can arrive while the weights are being written."""
    folder = tmp_path_factory.mktemp("base")
    return save_tiny_mixtral(folder, "bfloat16", hidden_size=512, intermediate_size=4096)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter"), b_std=0.3)


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "finetune.cli.main", "merge", *map(str, words)]


def kill_when(moment: Callable[[], bool], words: list[str]) -> None:
    """Start the command, SIGKILL it as soon as `moment` has come."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not moment():
        assert process.poll() is None, "the merge ended before the moment came"
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def newer(path: Path, started: float, size: int = 0) -> bool:
    """Whether `path` was made since `started` (not left by an earlier kill) and holds `size` bytes on disk."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return False
    return stat.st_ctime > started and stat.st_blocks * 512 >= size


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_nothing_that_looks_like_a_model(base: Path, adapter: Path, tmp_path: Path) -> None:
    output, partial = tmp_path / "merged", tmp_path / ".merged.partial"
    words = command(adapter, "--output", output)
    moments = {
        "the folder was made": (partial, 0),
        "the first weights were written": (partial / "model.safetensors", 2**20),
        "the weights are whole and the proof is running": (partial / "tokenizer.json", 0),
    }
    for path, size in moments.values():
        started = time.time()
        kill_when(lambda: newer(path, started, size), words)  # noqa: B023
        assert not output.exists()
        assert not (partial / "config.json").exists()
    assert partial.exists()

    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == [output]
    assert "each used exactly once" in done.stdout
    assert (output / REPORT_FILE).is_file()
    merged, adapted, plain = (logits(load(*folders)) for folders in ((output,), (base, adapter), (base,)))
    assert (merged - adapted).abs().mean() <= 0.1 * (plain - adapted).abs().mean()


def test_a_refusal_exits_1_with_its_line_and_no_traceback(base: Path, tmp_path: Path) -> None:
    done = subprocess.run(command(base, "--output", tmp_path / "merged"), capture_output=True, text=True)
    assert done.returncode == 1
    assert "is not an adapter folder: it has no adapter_config.json; give the folder that the run wrote" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_failing_proof_exits_1_and_leaves_no_output(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", b_std=1e-4)
    done = subprocess.run(command(adapter, "--output", tmp_path / "merged"), capture_output=True, text=True)
    assert done.returncode == 1
    assert "merge with --dtype float32" in done.stderr
    assert list(tmp_path.iterdir()) == [adapter]
