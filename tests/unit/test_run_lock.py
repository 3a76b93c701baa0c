"""One process at a time trains in a run folder; a lock does not survive its process."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.errors import RunError
from finetune.run import run_lock
from finetune.run.run_lock import lock_run, say_that_it_ends, unlock_run


@pytest.fixture
def other(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of another process that holds the folder, and `ends` after a second or `stays`."""
    reads, writes = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            lock_run(tmp_path)
            if request.param == "ends":
                say_that_it_ends(tmp_path)
            os.write(writes, b"held")
            time.sleep(1 if request.param == "ends" else 60)
        finally:
            os._exit(0)
    assert os.read(reads, 4) == b"held"
    yield process
    unlock_run(tmp_path)
    if request.param == "ends":
        os.waitpid(process, 0)


@pytest.mark.parametrize("other", ["stays"], indirect=True)
def test_the_second_process_is_refused_with_pid_and_host_until_the_first_is_killed(tmp_path: Path, other: int) -> None:
    with pytest.raises(RunError) as error:
        lock_run(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: another process is training in this folder; got pid {other} on {socket.gethostname()}; "
        "wait until it has ended, end it, or choose another output_dir"
    )
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    lock_run(tmp_path)


@pytest.mark.parametrize("other", ["ends"], indirect=True)
def test_a_process_that_is_about_to_end_is_waited_for(tmp_path: Path, other: int) -> None:
    started = time.monotonic()
    lock_run(tmp_path)
    assert 0.2 < time.monotonic() - started < 30


def test_a_forked_worker_does_not_hold_the_lock(tmp_path: Path) -> None:
    lock_run(tmp_path)
    worker = os.fork()
    if worker == 0:
        os.execv("/bin/sleep", ["sleep", "60"])
    unlock_run(tmp_path)
    lock_run(tmp_path)
    unlock_run(tmp_path)
    os.kill(worker, 9)
    os.waitpid(worker, 0)


def test_one_process_holds_a_folder_once(tmp_path: Path) -> None:
    lock_run(tmp_path)
    with pytest.raises(RunError, match=f"got this process, pid {os.getpid()}"):
        lock_run(tmp_path)
    say_that_it_ends(tmp_path)
    assert '"ends": true' in (tmp_path / run_lock.LOCK_FILE).read_text()
    unlock_run(tmp_path)
    unlock_run(tmp_path)
