"""Signals to `finetune train` of several processes, through torch's agent; what it starts here is quick to start."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.workspaces import write_workspace
from tests.families import save_tiny
from tests.faults.harness import ROOT
from tests.faults.runs import SECTIONS

RANK = """
import os, sys, time
from pathlib import Path
from finetune.launcher import launcher_process
from finetune.stopping import stop
rank = os.environ["RANK"]
stop.install()
stop.watch(launcher_process(), 60)
with stop.deferred():
    Path(f"ready-{rank}").touch()
    while stop.requested is None:
        time.sleep(0.05)
    time.sleep(float(sys.argv[1]))
    Path(f"saved-{rank}").touch()
sys.exit(stop.finish(stop.exit_code))
"""
ALONE = """
import json, os, sys, time
from finetune.launcher import launch_command
from finetune.stopping import stop
stop.install()
with stop.deferred():
    print(json.dumps([os.getpid(), launch_command()]), flush=True)
    while stop.requested is None:
        time.sleep(0.05)
sys.exit(stop.finish(stop.exit_code))
"""
TWO = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",
    "use_cpu": True,
    "num_machines": 1,
    "machine_rank": 0,
    "num_processes": 2,
    "mixed_precision": "no",
    "gpu_ids": "all",
    "main_process_port": 0,
}


class Launched:
    """The launcher and two processes, in a session of their own."""

    def __init__(self, folder: Path, seconds: float, *launcher: str) -> None:
        (folder / "rank.py").write_text(RANK)
        (folder / "two.json").write_text(json.dumps(TWO))
        words = [sys.executable, *launcher, str(folder / "rank.py"), str(seconds)]
        self.folder = folder
        self.log = (folder / "log").open("w+")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=self.log, stderr=self.log, start_new_session=True
        )
        self.ranks: list[psutil.Process] = []

    def wait_until_they_train(self) -> None:
        end = time.monotonic() + 120
        while not self._have("ready") and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
        assert self._have("ready"), self.said()
        self.ranks = psutil.Process(self.process.pid).children(recursive=True)
        assert len(self.ranks) == 2

    def has_saved(self) -> bool:
        return self._have("saved")

    def code(self, seconds: float) -> int:
        return self.process.wait(seconds)

    def left(self, seconds: float) -> list[psutil.Process]:
        """What still runs after so many seconds."""
        return psutil.wait_procs(self.ranks, seconds)[1]

    def said(self) -> str:
        return (self.folder / "log").read_text()

    def _have(self, what: str) -> bool:
        return all((self.folder / f"{what}-{rank}").exists() for rank in (0, 1))

    def close(self) -> None:
        self.log.close()
        for process in [*self.ranks, psutil.Process(self.process.pid)] if self.process.poll() is None else self.ranks:
            with suppress(psutil.Error):
                process.kill()
        self.process.wait()


OURS = ("-m", "finetune.launcher", "--config_file", "two.json")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@contextmanager
def launched(folder: Path, *launcher: str, seconds: float = 0.5) -> Iterator[Launched]:
    processes = Launched(folder, seconds, *launcher)
    try:
        processes.wait_until_they_train()
        yield processes
    finally:
        processes.close()


def test_a_signal_to_the_launcher_reaches_every_process_which_gets_the_time_that_it_needs(tmp_path: Path) -> None:
    with launched(tmp_path, *OURS) as processes:
        processes.process.send_signal(signal.SIGUSR1)
        assert processes.code(30) == 85
        assert processes.has_saved()
        assert processes.left(0) == []
        assert "Traceback" not in processes.said()


@pytest.mark.faults
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)])
def test_the_exit_code_is_that_of_the_signal(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with launched(tmp_path, *OURS) as processes:
        processes.process.send_signal(number)
        assert processes.code(30) == code
        assert processes.has_saved()
        assert processes.left(0) == []


@pytest.mark.faults
def test_a_step_that_takes_longer_than_torch_would_wait_is_taken_to_its_end(tmp_path: Path) -> None:
    with launched(tmp_path, *OURS, seconds=40) as processes:
        processes.process.send_signal(signal.SIGTERM)
        assert processes.code(80) == 0
        assert processes.has_saved()


@pytest.mark.faults
def test_a_signal_to_the_launcher_and_to_every_process_counts_once(tmp_path: Path) -> None:
    """As `scancel --signal=INT` sends it."""
    with launched(tmp_path, *OURS) as processes:
        for number in [processes.process.pid, *(process.pid for process in processes.ranks)]:
            os.kill(number, signal.SIGINT)
        assert processes.code(30) == 130
        assert processes.has_saved()


@pytest.mark.faults
def test_a_second_ctrl_c_ends_everything_at_once(tmp_path: Path) -> None:
    with launched(tmp_path, *OURS, seconds=60) as processes:
        processes.process.send_signal(signal.SIGINT)
        time.sleep(1)
        processes.process.send_signal(signal.SIGINT)
        assert processes.code(3) == 130
        assert processes.left(3) == []
        assert not processes.has_saved()
        assert "Traceback" not in processes.said()


@pytest.mark.faults
@pytest.mark.parametrize("launcher", [OURS, TORCHRUN], ids=["finetune", "torchrun"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR2])
def test_without_their_launcher_the_processes_save_and_end(
    tmp_path: Path, launcher: tuple[str, ...], number: signal.Signals
) -> None:
    with launched(tmp_path, *launcher) as processes:
        processes.process.send_signal(number)
        assert processes.code(3) == -number
        assert processes.left(30) == []
        assert processes.has_saved()


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_under_plain_torchrun_a_signal_saves_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    with launched(tmp_path, *TORCHRUN) as processes:
        processes.process.send_signal(number)
        processes.code(40)
        assert processes.left(30) == []
        assert processes.has_saved()


@pytest.mark.faults
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 85), (signal.SIGINT, 130)])
def test_before_anything_is_started_the_launcher_just_ends(tmp_path: Path, number: signal.Signals, code: int) -> None:
    processes = Launched(tmp_path, 0.5, *OURS)
    try:
        time.sleep(3)  # while it imports torch
        processes.process.send_signal(number)
        assert processes.code(15) == code
        assert processes.said() == "stopped before it trained; run the same command again\n"
    finally:
        processes.close()


@pytest.mark.faults
def test_one_process_takes_the_place_of_the_launcher(tmp_path: Path) -> None:
    flags = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    (tmp_path / "alone.py").write_text(ALONE)
    words = [sys.executable, "-m", "finetune.launcher", *flags, str(tmp_path / "alone.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == [process.pid, [*flags, str(tmp_path / "alone.py")]]
        process.send_signal(signal.SIGUSR1)
        assert process.wait(20) == 85


@pytest.mark.faults
def test_the_same_command_right_after_its_launcher_was_killed_waits_and_finishes_the_run(tmp_path: Path) -> None:
    save_tiny("deepseek_v3", tmp_path / "base")
    write_workspace(tmp_path, **SECTIONS)
    (tmp_path / "two.json").write_text(json.dumps(TWO))
    steps = 40
    words = [sys.executable, "-m", "finetune.cli.main", "train", "--config_file", "two.json", "recipe.yaml"]
    words += [f"training.max_steps={steps}", "training.save_steps=20", "training.eval_steps=20"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FINETUNE_CACHE": str(tmp_path / "cache")}
    metrics = tmp_path / "run" / "metrics.jsonl"
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True)
        while not (metrics.exists() and metrics.read_text().strip()) and first.poll() is None:
            time.sleep(0.2)
    assert first.poll() is None, (tmp_path / "log").read_text()
    ranks = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert psutil.wait_procs(ranks, 0)[1] == []
    assert "stopped after step" in (tmp_path / "log").read_text()
    assert "Traceback" not in done.stderr
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, steps + 1))
    assert (tmp_path / "run" / "adapter").is_dir()
