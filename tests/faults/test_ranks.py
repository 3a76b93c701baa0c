"""Two processes of a real run, of which one is killed or stopped: the run ends, says which, and leaves no process."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from tests.end_to_end.workspaces import write_workspace
from tests.faults.runs import SECTIONS
from tests.support import save_tiny_mixtral

BIN = Path(sys.executable).parent
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "-m", "finetune.train"]
FINETUNE = [str(BIN / "finetune"), "train", "--config_file", "two.yaml"]
TWO = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "use_cpu": True, "gpu_ids": "all"}
STARTS, ENDS = 240, 60
"""Seconds in which a run starts, also on a busy machine, and in which it must end."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny_mixtral(folder / "base")
    training = {**SECTIONS["training"], "max_steps": 500, "save_steps": 2, "rank_timeout": 10}
    write_workspace(folder, **{**SECTIONS, "training": training, "router": {"router_aux_loss_coef": 0.02}})
    machine = {"num_machines": 1, "machine_rank": 0, "num_processes": 2, "mixed_precision": "no"}
    (folder / "two.yaml").write_text(yaml.safe_dump({**TWO, **machine}))
    return folder


@dataclass
class Ended:
    """`lost`: the process that the signal was sent to; `left`: processes of the run after its end."""

    code: int
    seconds: float
    output: str
    lost: int
    left: int


def processes(launcher: int) -> dict[int, psutil.Process]:
    """Those of the run, by rank."""
    found = {}
    for child in psutil.Process(launcher).children(recursive=True):
        try:
            if "finetune.train" in child.cmdline() and (rank := child.environ().get("RANK")):
                found[int(rank)] = child
        except psutil.Error:
            continue
    return found


def run_and_send(folder: Path, command: Sequence[str], rank: int, number: signal.Signals, seen: str) -> Ended:
    """Start, wait until `seen` was printed, send the signal to one process, and wait for the end."""
    name = f"{Path(command[0]).name}-{rank}-{number.name}-{len(seen)}"
    environment = {**os.environ, "FINETUNE_CACHE": str(folder / name), "ACCELERATE_USE_CPU": "true"}
    log = folder / f"{name}.log"
    words = [*command, "recipe.yaml", f"output_dir={name}"]
    with log.open("w") as output:
        launcher = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    deadline = time.monotonic() + STARTS
    while seen not in log.read_text(errors="replace"):
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        assert launcher.poll() is None, log.read_text(errors="replace")
        time.sleep(0.2)
    both = processes(launcher.pid)
    try:
        assert sorted(both) == [0, 1]
        since = time.monotonic()
        both[rank].send_signal(number)
        launcher.wait(ENDS)
        seconds = time.monotonic() - since
        left = sum(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in both.values())
    finally:
        for one in both.values():
            if one.is_running():
                one.kill()
        launcher.kill()
    return Ended(launcher.returncode, seconds, log.read_text(errors="replace"), both[rank].pid, left)


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run(rank: int, workspace: Path) -> None:
    ended = run_and_send(workspace, FINETUNE, rank, signal.SIGKILL, "'loss'")
    assert ended.left == 0
    assert ended.seconds < 30
    assert f"rank {rank} (host {socket.gethostname()}, pid {ended.lost}): has ended without a word while training" in (
        ended.output
    )
    assert f"process {rank}: was ended by SIGKILL" in ended.output
    assert ended.code == 128 + signal.SIGKILL
    assert "Traceback" not in ended.output


@pytest.mark.faults
def test_a_process_killed_before_the_training_ends_the_run(workspace: Path) -> None:
    ended = run_and_send(workspace, FINETUNE, 1, signal.SIGKILL, "attention ")
    assert ended.left == 0
    assert ended.seconds < 30
    assert f"pid {ended.lost}): has ended without a word" in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_ends_the_run_after_the_timeout(rank: int, workspace: Path) -> None:
    ended = run_and_send(workspace, FINETUNE, rank, signal.SIGSTOP, "'loss'")
    assert ended.left == 0
    assert ended.seconds > 9
    reason = f"rank {rank} (host {socket.gethostname()}, pid {ended.lost}): has not answered for 10 s while training"
    assert reason in ended.output
    assert "(it is stopped)" in ended.output
    assert ended.code == 1
    assert "Traceback" not in ended.output


@pytest.mark.faults
def test_under_torchrun_the_processes_say_one_line(workspace: Path) -> None:
    ended = run_and_send(workspace, TORCHRUN, 1, signal.SIGKILL, "'loss'")
    assert ended.left == 0
    assert ended.output.count(f"pid {ended.lost}): has ended without a word while training") == 1
    assert "[rank0]: Traceback" not in ended.output
