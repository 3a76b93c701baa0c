"""Two machines train together; one of them, its cable or its process is lost, and the same command continues."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from tests.end_to_end.workspaces import differing, write_workspace
from tests.families import save_tiny
from tests.faults.machines import Command, Machine, two_machines
from tests.faults.runs import SECTIONS

BIN = Path(sys.executable).parent
STEPS, TIMEOUT = 80, 10
STARTS, ENDS = 240, 60
"""Seconds in which a run starts, also on a busy machine, and in which the others must end."""
BUSY = 15
"""Seconds that this machine, which is two and runs other tests, may need besides."""
PORT = 29571
ONE_EPOCH = 8  # steps: 34 rows

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sequence[Machine]]:
    try:
        with two_machines(tmp_path_factory.mktemp("logs")) as both:
            yield both
    except PermissionError as error:
        pytest.skip(f"no network namespaces here: {error}")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe in a folder that both machines share, a config for each, and runs of processes on one machine."""
    folder = tmp_path_factory.mktemp("machines")
    save_tiny("deepseek_v3", folder / "base")
    training = {**SECTIONS["training"], "max_steps": STEPS, "save_steps": 10, "eval_steps": 40, "rank_timeout": TIMEOUT}
    lora = {**SECTIONS["lora"], "lora_dropout": 0.0}
    write_workspace(folder, **{**SECTIONS, "training": training, "lora": lora})
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "use_cpu": True}
    config |= {"num_machines": 2, "num_processes": 2, "mixed_precision": "no", "gpu_ids": "all", "same_network": True}
    config |= {"main_process_ip": Machine(0, folder).address, "main_process_port": PORT, "rdzv_backend": "static"}
    for number in (0, 1):
        (folder / f"machine-{number}.yaml").write_text(yaml.safe_dump({**config, "machine_rank": number}))
    return folder


@pytest.fixture(scope="module")
def whole(workspace: Path) -> Path:
    """A run of two processes that nothing happened to."""
    return on_this_machine(workspace, 2, "whole")


def on_this_machine(workspace: Path, processes: int, name: str, *overrides: str) -> Path:
    command = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(processes), "-m", "finetune.train"]
    environment = {**os.environ, "FINETUNE_CACHE": str(workspace / "cache"), "ACCELERATE_USE_CPU": "true"}
    words = [*command, "recipe.yaml", f"output_dir={name}", *overrides]
    done = subprocess.run(words, cwd=workspace, env=environment, capture_output=True, text=True, timeout=STARTS)
    assert done.returncode == 0, done.stderr
    return workspace / name


def start(machines: Sequence[Machine], workspace: Path, name: str, *overrides: str) -> list[Command]:
    """The same command on both."""
    variables = {"FINETUNE_CACHE": str(workspace / "cache"), "ACCELERATE_USE_CPU": "true"}
    return [
        machine.start(
            workspace,
            str(BIN / "finetune"),
            "train",
            "--config_file",
            f"machine-{machine.number}.yaml",
            "recipe.yaml",
            f"output_dir={name}",
            *overrides,
            **variables,
        )
        for machine in machines
    ]


def finish(machines: Sequence[Machine], workspace: Path, name: str, *overrides: str) -> Path:
    both = start(machines, workspace, name, *overrides)
    for command in both:
        code, _ = command.wait(STARTS)
        assert code == 0, command.output
    return workspace / name


def train_until_it_saves(machines: Sequence[Machine], workspace: Path, name: str) -> list[Command]:
    both = start(machines, workspace, name)
    wait_for_checkpoint(both[0], workspace / name)
    return both


def wait_for_checkpoint(command: Command, run: Path) -> None:
    deadline = time.monotonic() + STARTS
    while not (run / "checkpoint-10").exists():
        assert time.monotonic() < deadline, command.output
        assert command.process.poll() is None, command.output
        time.sleep(0.02)


def assert_lost(command: Command, line: str, seconds: float) -> None:
    """The command ends in time, not well, and with this last line."""
    code, took = command.wait(seconds)
    print(f"{line}: {took:.1f} s")
    assert code not in (0, None), command.output
    assert command.last_line.startswith(line), command.output
    assert command.last_line.endswith("; the same command continues")
    assert "Traceback" not in command.output


def test_two_machines_train_as_one_process_does(machines: Sequence[Machine], workspace: Path) -> None:
    steps = f"training.max_steps={ONE_EPOCH}"
    one = on_this_machine(workspace, 1, "one", steps)
    two = finish(machines, workspace, "two", steps)
    assert (one / "adapter/adapter_model.safetensors").read_bytes() == (
        two / "adapter/adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("lost", [0, 1])
def test_a_machine_is_lost(lost: int, machines: Sequence[Machine], workspace: Path, whole: Path) -> None:
    name = f"machine-{lost}"
    both = train_until_it_saves(machines, workspace, name)
    both[lost].kill_machine()
    assert_lost(both[1 - lost], f"rank {lost} on {machines[lost].name} ended or cannot be reached at step ", ENDS)
    assert differing(finish(machines, workspace, name), whole) == []


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_is_killed(lost: int, machines: Sequence[Machine], workspace: Path, whole: Path) -> None:
    """Its own launcher knows the signal."""
    name = f"process-{lost}"
    both = train_until_it_saves(machines, workspace, name)
    both[lost].rank().send_signal(signal.SIGKILL)
    host = machines[lost].name
    assert_lost(both[lost], f"rank {lost} on {host} ended (signal 9) at step ", ENDS)
    assert_lost(both[1 - lost], f"rank {lost} on {host} ended or cannot be reached at step ", ENDS)
    assert differing(finish(machines, workspace, name), whole) == []


@pytest.mark.parametrize("pulled", [0, 1])
def test_a_cable_is_pulled(pulled: int, machines: Sequence[Machine], workspace: Path, whole: Path) -> None:
    name = f"cable-{pulled}"
    both = train_until_it_saves(machines, workspace, name)
    machines[pulled].plug(up=False)
    try:
        assert_lost(both[0], f"rank 1 on {machines[1].name} has not answered for {TIMEOUT} s at step ", TIMEOUT + BUSY)
        assert_lost(both[1], f"rank 0 on {machines[0].name} ended or cannot be reached at step ", TIMEOUT + BUSY)
    finally:
        machines[pulled].plug(up=True)
    assert differing(finish(machines, workspace, name), whole) == []


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_is_stopped(stopped: int, machines: Sequence[Machine], workspace: Path, whole: Path) -> None:
    name = f"stopped-{stopped}"
    both = train_until_it_saves(machines, workspace, name)
    both[stopped].rank().send_signal(signal.SIGSTOP)
    line = f"rank {stopped} on {machines[stopped].name} has not answered for {TIMEOUT} s at step "
    assert_lost(both[1 - stopped], line, TIMEOUT + BUSY)
    both[stopped].kill_machine()
    both[stopped].wait(ENDS)
    assert differing(finish(machines, workspace, name), whole) == []


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_the_agents_of_both_machines_start_again(
    rendezvous: str, machines: Sequence[Machine], workspace: Path, whole: Path
) -> None:
    """With c10d only the agent of the killed process counts a restart."""
    name, address = f"again-{rendezvous}", machines[0].address
    how = {
        "static": ["--master-addr", address, "--master-port", str(PORT)],
        "c10d": ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address}:{PORT}", "--rdzv-id", "faults"],
    }[rendezvous]
    variables = {"FINETUNE_CACHE": str(workspace / "cache"), "ACCELERATE_USE_CPU": "true"}
    both = []
    for machine in machines:
        where = ["--nnodes", "2", "--node-rank", str(machine.number), "--local-addr", machine.address]
        words = [str(BIN / "torchrun"), *how, *where, "--nproc-per-node", "1", "--max-restarts", "2"]
        words += ["-m", "finetune.train", "recipe.yaml", f"output_dir={name}"]
        both.append(machine.start(workspace, *words, **variables))
    wait_for_checkpoint(both[0], workspace / name)
    killed = both[1].rank()
    killed.send_signal(signal.SIGKILL)
    killed.wait(ENDS)
    for command in both:
        code, _ = command.wait(STARTS)
        assert code == 0, command.output
    assert any("continues from checkpoint-" in command.output for command in both)
    assert differing(workspace / name, whole) == []
