"""`--max_restarts`: torch's agent starts all processes again, and the run ends as if nothing had happened."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.end_to_end.workspaces import differing
from tests.faults.harness import ROOT
from tests.faults.test_ranks import BIN, ENDS, STARTS, TORCHRUN, processes, workspace

__all__ = ["workspace"]

# Two operations, so that there are addresses and counters in the store; in the first attempt one process is killed.
RANK = """
import os, signal, torch
from datetime import timedelta
from finetune.failures import group_arguments
arguments = group_arguments(timedelta(seconds=60))
torch.distributed.init_process_group("gloo", **arguments)
for _ in range(2):
    torch.distributed.all_reduce(torch.ones(4))
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.kill(os.getpid(), signal.SIGKILL)
torch.distributed.all_reduce(total := torch.ones(1))
print(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}: {total.item()}", flush=True)
os._exit(0)
"""
RESTARTED = ["--config_file", "two.yaml", "--max_restarts", "2", "-m", "finetune.train"]
STEPS = "training.max_steps=40"


@pytest.mark.parametrize("standalone", [False, pytest.param(True, marks=pytest.mark.faults)])
def test_the_processes_of_a_second_attempt_find_each_other(standalone: bool, tmp_path: Path) -> None:
    """With an address, as `accelerate launch` starts them, and without."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = ["--master-addr", "127.0.0.1", "--master-port", str(free.getsockname()[1])]
    rendezvous = ["--standalone"] if standalone else address
    (tmp_path / "rank.py").write_text(RANK)
    words = [str(BIN / "torchrun"), *rendezvous, "--nproc-per-node", "2", "--max-restarts", "1", "rank.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("attempt 1: 2.0") == 2


@pytest.fixture(scope="module")
def whole(workspace: Path) -> Path:
    """A run of two processes that nothing happened to."""
    environment = {**os.environ, "FINETUNE_CACHE": str(workspace / "cache"), "ACCELERATE_USE_CPU": "true"}
    words = [*TORCHRUN, "recipe.yaml", "output_dir=whole", STEPS]
    done = subprocess.run(words, cwd=workspace, env=environment, capture_output=True, text=True, timeout=STARTS)
    assert done.returncode == 0, done.stderr
    return workspace / "whole"


@pytest.mark.faults
@pytest.mark.parametrize("launcher", [[str(BIN / "accelerate"), "launch"], [sys.executable, "-m", "finetune.launcher"]])
def test_a_run_that_is_started_again_twice_ends_as_if_nothing_had_happened(
    launcher: Sequence[str], workspace: Path, whole: Path
) -> None:
    name = f"restarted-{len(launcher)}"
    log = workspace / f"{name}.log"
    environment = {**os.environ, "FINETUNE_CACHE": str(workspace / "cache"), "ACCELERATE_USE_CPU": "true"}
    words = [*launcher, *RESTARTED, "recipe.yaml", f"output_dir={name}", STEPS]
    with log.open("w") as output:
        running = subprocess.Popen(words, cwd=workspace, env=environment, stdout=output, stderr=output)
    try:
        for attempt, rank in enumerate((1, 0)):
            deadline = time.monotonic() + STARTS
            # The attempt has saved two checkpoints of its own.
            while not (workspace / name / f"checkpoint-{4 + 8 * attempt}").exists():
                assert time.monotonic() < deadline, log.read_text()
                assert running.poll() is None, log.read_text()
                time.sleep(0.02)
            both = processes(running.pid)
            assert sorted(both) == [0, 1]
            both[rank].send_signal(signal.SIGKILL)
            both[rank].wait(ENDS)
        assert running.wait(STARTS) == 0, log.read_text()
    finally:
        running.kill()
    said = log.read_text()
    for rank, left in ((1, 2), (0, 1)):
        assert f"rank {rank} on " in said
        assert said.count(f"; the launcher starts it again (--max_restarts: {left} left)") == 1
    assert differing(workspace / name, whole) == []
