"""Two processes of a run, forked from here: the one that is left names the one that was lost, and ends."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from finetune.errors import Problem, RunError
from finetune.failures import end_run, finish_ranks, ranks_training, watch_ranks
from finetune.failures import ranks as ranks_module
from finetune.failures.store import attempt
from finetune.progress import SHARED, phase

Work = Callable[[int], None]
FORK = multiprocessing.get_context("fork")


def process(rank: int, port: int, stderr: Path, timeout: int, work: Work) -> None:
    """What `finetune.train` does around a training, without a model."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = os.fdopen(2, "w")
    distributed.init_process_group("gloo", timeout=timedelta(seconds=30))
    code = 0
    try:
        with phase("training"):
            watch_ranks(timeout)
            with ranks_training():
                work(rank)
        finish_ranks()
    except Exception as error:
        code = end_run(error)
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def two_processes(folder: Path, timeout: int, *work: Work) -> Iterator[list[Any]]:
    """Both, each with its own `work`; afterwards none of them is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [FORK.Process(target=process, args=(n, port, folder / f"{n}.txt", timeout, work[n])) for n in (0, 1)]
    for each in both:
        each.start()
    yield both
    for each in both:
        each.join(timeout=30)
        assert each.exitcode is not None, "a process is left"


def said(folder: Path, rank: int) -> str:
    return (folder / f"{rank}.txt").read_text()


def steps(_rank: int) -> None:
    """Training steps, as far as other processes see them."""
    for _ in range(200):
        distributed.all_reduce(torch.ones(4))
        time.sleep(0.05)


def once_started() -> None:
    time.sleep(1)


def test_a_killed_process_is_named_by_the_one_that_is_left(tmp_path: Path) -> None:
    with two_processes(tmp_path, 30, steps, steps) as both:
        once_started()
        os.kill(both[1].pid, signal.SIGKILL)
        since = time.monotonic()
        both[0].join(timeout=20)
        assert time.monotonic() - since < 5
    assert both[0].exitcode == 1
    line = said(tmp_path, 0).strip()
    assert line == f"rank 1 on {socket.gethostname()} ended (signal 9) while training; the same command continues"


def test_a_stopped_process_is_named_after_the_timeout(tmp_path: Path) -> None:
    with two_processes(tmp_path, 1, steps, steps) as both:
        once_started()
        os.kill(both[1].pid, signal.SIGSTOP)
        since = time.monotonic()
        both[0].join(timeout=20)
        assert time.monotonic() - since < 6
        os.kill(both[1].pid, signal.SIGKILL)
    assert both[0].exitcode == 1
    line = said(tmp_path, 0).strip()
    rank = f"rank 1 on {socket.gethostname()}"
    assert line.startswith(f"{rank} has not answered for 1 s while training (process {both[1].pid} is stopped); look")
    assert "training.rank_timeout" in line


def test_a_process_that_works_longer_than_the_timeout_has_not_stopped(tmp_path: Path) -> None:
    def works(_rank: int) -> None:
        time.sleep(3)
        distributed.barrier()

    def waits(_rank: int) -> None:
        distributed.barrier()

    with two_processes(tmp_path, 1, works, waits) as both:
        pass
    assert [each.exitcode for each in both] == [0, 0]
    assert said(tmp_path, 0) == said(tmp_path, 1) == ""


def test_an_error_of_one_process_is_the_reason_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.failures.end.LAUNCHER_SECONDS", 0)  # there is no launcher to wait for

    def fails(_rank: int) -> None:
        distributed.all_reduce(torch.ones(1))
        raise RunError(Problem("rows.jsonl:3", "the loss is not finite", "look at this row"))

    with two_processes(tmp_path, 30, steps, fails) as both:
        pass
    assert [each.exitcode for each in both] == [1, 1]
    assert said(tmp_path, 1) == "rows.jsonl:3: the loss is not finite; look at this row\n"
    reason = f"rank 1 on {socket.gethostname()} has failed: rows.jsonl:3: the loss is not finite; look at this row"
    assert said(tmp_path, 0).strip().endswith(reason)


def test_the_timeout_reaches_every_process_group(tmp_path: Path) -> None:
    """A process that is alive and takes part in nothing: its heartbeats go on, so the operation itself must end.

    A group that is made later, as those within and across machines are, would wait for 30 minutes.
    """

    def hangs(_rank: int) -> None:
        distributed.new_group([0, 1])
        time.sleep(6)

    def waits(_rank: int) -> None:
        later = distributed.new_group([0, 1])
        ranks_module._RANKS[0].limit(timedelta(seconds=0.5))
        with pytest.raises(RuntimeError):
            distributed.barrier(later)
        distributed.barrier()

    with two_processes(tmp_path, 30, waits, hangs):
        pass
    line = said(tmp_path, 0)
    assert "an operation between the processes failed although all of them answer; got RuntimeError:" in line
    assert f"rank 1 on {socket.gethostname()}: training" in line


def test_a_process_that_the_kernel_ended_for_want_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = tmp_path / "vmstat"
    counts.write_text("nr_free_pages 10\noom_kill 2\n")
    monkeypatch.setattr("finetune.environment._KERNEL_COUNTS", counts)
    with two_processes(tmp_path, 300, steps, steps) as both:
        once_started()
        counts.write_text("nr_free_pages 10\noom_kill 3\n")
        os.kill(both[1].pid, signal.SIGKILL)
    assert "ended (signal 9) while training, just when the kernel ended a process because memory was used up; take" in (
        said(tmp_path, 0)
    )


def test_a_process_that_ends_by_itself_without_a_word(tmp_path: Path) -> None:
    def leaves(_rank: int) -> None:
        time.sleep(0.5)
        os._exit(3)

    with two_processes(tmp_path, 30, steps, leaves):
        pass
    assert f"rank 1 on {socket.gethostname()} ended (exit code 3) while training; the same" in said(tmp_path, 0)


def test_the_launcher_says_it_where_it_will(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a process that it does not end says it in the end."""
    monkeypatch.setenv(SHARED, "/proc/1/fd/0")
    monkeypatch.setattr("finetune.failures.end.LAUNCHER_SECONDS", 3)
    monkeypatch.setattr("finetune.failures.ranks.LAUNCHER_SECONDS", 3)
    with two_processes(tmp_path, 30, steps, steps) as both:
        once_started()
        os.kill(both[1].pid, signal.SIGKILL)
        both[0].join(timeout=2)
        assert said(tmp_path, 0) == ""
    assert "ended (signal 9) while training" in said(tmp_path, 0)


def test_of_a_run_that_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SHARED, "/proc/1/fd/0")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    with two_processes(tmp_path, 30, steps, steps) as both:
        once_started()
        os.kill(both[1].pid, signal.SIGKILL)
    assert "(signal 9) while training; the launcher starts it again (--max_restarts: 2 left)" in said(tmp_path, 0)


def empty_store() -> Any:
    c10d: Any = distributed
    return c10d.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_each_attempt_has_a_name_of_its_own() -> None:
    """In a store that keeps what ended processes have left."""
    store = empty_store()
    seconds, names = timedelta(seconds=20), []
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            clones = [store.clone() for _ in range(3)]
            named = [pool.submit(attempt, clone, rank, 3, seconds) for rank, clone in enumerate(clones)]
            names.append({each.result() for each in named})
    assert [len(each) for each in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3


@pytest.mark.parametrize(("rank", "who"), [(0, "rank 1 has"), (1, "rank 0 has")])
def test_a_process_that_does_not_start_is_named(rank: int, who: str) -> None:
    store = empty_store()
    with pytest.raises(RunError, match=f"^processes: {who} not started within 1 s; got 2 expected; start the same"):
        attempt(store, rank, 2, timedelta(seconds=1))
