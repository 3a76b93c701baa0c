"""Processes of a real run, of which some are killed or stopped: the run ends, says which, and leaves no process."""

import os
import re
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
FOUR = ["-m", "finetune.launcher", "--config_file", "two.yaml", "--num_processes", "4", "-m", "finetune.train"]
HOST = socket.gethostname()
LAST = re.compile(rf"rank \d on {re.escape(HOST)} ended \(signal 9\) at step \d+; the same command continues")
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

    @property
    def last_line(self) -> str:
        return self.output.rstrip().splitlines()[-1]


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


def run_and_send(
    folder: Path, command: Sequence[str], ranks: Sequence[int], number: signal.Signals, seen: str, count: int = 2
) -> Ended:
    """Start, wait until `seen` was printed, send the signal to these processes, and wait for the end."""
    name = f"{Path(command[0]).name}-{len(command)}-{ranks}-{number.name}-{len(seen)}".replace(" ", "")
    environment = {**os.environ, "FINETUNE_CACHE": str(folder / name), "ACCELERATE_USE_CPU": "true"}
    log = folder / f"{name}.log"
    words = [*command, "recipe.yaml", f"output_dir={name}", f"training.per_device_train_batch_size={4 // count}"]
    with log.open("w") as output:
        launcher = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    deadline = time.monotonic() + STARTS
    while seen not in log.read_text(errors="replace"):
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        assert launcher.poll() is None, log.read_text(errors="replace")
        time.sleep(0.2)
    started = processes(launcher.pid)
    try:
        assert sorted(started) == list(range(count))
        since = time.monotonic()
        for rank in ranks:
            started[rank].send_signal(number)
        launcher.wait(ENDS)
        seconds = time.monotonic() - since
        left = sum(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in started.values())
    finally:
        for one in started.values():
            if one.is_running():
                one.kill()
        launcher.kill()
    return Ended(launcher.returncode, seconds, log.read_text(errors="replace"), started[ranks[0]].pid, left)


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run(rank: int, workspace: Path) -> None:
    ended = run_and_send(workspace, FINETUNE, [rank], signal.SIGKILL, "'loss'")
    assert ended.left == 0
    assert ended.seconds < 30
    assert ended.output.count("the same command continues") == 1
    assert LAST.fullmatch(ended.last_line), ended.last_line
    assert ended.last_line.startswith(f"rank {rank} on {HOST} ")
    assert ended.code == 128 + signal.SIGKILL
    assert "Traceback" not in ended.output


@pytest.mark.faults
def test_a_process_killed_before_the_training_ends_the_run(workspace: Path) -> None:
    ended = run_and_send(workspace, FINETUNE, [1], signal.SIGKILL, "attention ")
    assert ended.left == 0
    assert ended.seconds < 30
    assert re.fullmatch(
        rf"rank 1 on {HOST} ended \(signal 9\) (while|at step) .+; the same command continues", ended.last_line
    )
    assert "Traceback" not in ended.output


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_ends_the_run_after_the_timeout(rank: int, workspace: Path) -> None:
    ended = run_and_send(workspace, FINETUNE, [rank], signal.SIGSTOP, "'loss'")
    assert ended.left == 0
    assert ended.seconds > 9
    assert ended.last_line.startswith(f"rank {rank} on {HOST} has not answered for 10 s at step ")
    assert f"(process {ended.lost} is stopped); look at its machine; " in ended.last_line
    assert ended.code == 1
    assert "Traceback" not in ended.output


@pytest.mark.faults
def test_under_torchrun_the_processes_say_one_line(workspace: Path) -> None:
    ended = run_and_send(workspace, TORCHRUN, [1], signal.SIGKILL, "'loss'")
    assert ended.left == 0
    assert len(LAST.findall(ended.output)) == 1
    assert f"rank 1 on {HOST} ended (signal 9) at step " in ended.output
    assert "[rank0]: Traceback" not in ended.output


@pytest.mark.faults
@pytest.mark.parametrize("seen", ["'loss'", "attention "])
def test_two_of_four_processes_killed_at_once(seen: str, workspace: Path) -> None:
    ended = run_and_send(workspace, [sys.executable, *FOUR], [0, 2], signal.SIGKILL, seen, count=4)
    assert ended.left == 0
    assert ended.output.count("the same command continues") == 1
    assert ended.last_line.startswith((f"rank 0 on {HOST} ended (signal 9)", f"rank 2 on {HOST} ended (signal 9)"))
    assert "Traceback" not in ended.output
