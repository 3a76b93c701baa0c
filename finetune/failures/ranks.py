"""Processes of one run, which ends when one of them does: heartbeats, and one reason for all.

Each process counts up a number in the store of the process group from a thread of its own, and reads the others'. A
process whose number stands still for `training.rank_timeout` has stopped; one that works for an hour before training,
while the others wait in a barrier, has not. So the timeout of the group's own operations is long before and after
training, and ends a run in training of which every process is alive and one takes part in nothing.

The first process that fails writes its reason into the store. On each machine one process prints it; the others wait
for the launcher, which ends them, and print it themselves if it does not. Where a signal has ended a process of this
machine, and `finetune train` has started it, the launcher says so last of all, and nobody else.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from finetune.environment import memory_kills
from finetune.errors import FinetuneError, Problem
from finetune.failures.peers import Exits, Peer, doing, this_process
from finetune.progress import CONTINUE, PROGRESS, SHARED, ended_line, when
from finetune.stopping import stop
from finetune.upstream import private

START_SECONDS = 300
"""The processes wait for each other at the start at least so long: they import packages at different speeds."""

LAUNCHER_SECONDS = 20
"""After so long the launcher has ended the other processes; those that are left say the reason themselves."""

_NO_LIMIT = timedelta(days=7)
_LEAST_IN_TRAINING = 60  # seconds
_GRACE_SECONDS = 5  # for the main thread, which knows more, to fail by itself
_LEAST_WATCHED = 2  # seconds in which a process that lives has beaten
_CONNECTION = ("gloo/", "Connection closed by peer", "Connection reset by peer")
_DONE = b"done"

_RANKS: list["Ranks"] = []


@dataclass
class _Beat:
    """The last value that was read of a process, and since when it stands still; `cpu`: seconds it had worked then."""

    value: bytes
    since: float
    cpu: float


def start_timeout(rank_timeout: int) -> timedelta:
    """The timeout with which the process group is made."""
    return timedelta(seconds=max(rank_timeout, START_SECONDS))


def watch_ranks(rank_timeout: int) -> None:
    """Start the heartbeats of this process, once the process group exists; does nothing with one process."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        _RANKS[:] = [Ranks(rank_timeout)]


def finish_ranks() -> None:
    """This process has done its part of the run, and may end before the others."""
    while _RANKS:
        _RANKS.pop().finish()


@contextmanager
def ranks_training() -> Iterator[None]:
    """While training an operation between the processes may take twice `training.rank_timeout`, or a minute."""
    for ranks in _RANKS:
        ranks.limit(timedelta(seconds=max(2 * ranks.timeout, _LEAST_IN_TRAINING)))
    yield
    for ranks in _RANKS:
        ranks.limit(_NO_LIMIT)


def first_reason(error: BaseException) -> tuple[str, bool]:
    """Why the run ends, and whether this process says it at once. `error` is what happened here."""
    if not _RANKS:
        # Nothing connects them yet: every process has the same error, and one of each machine says it.
        return str(error), os.environ.get("LOCAL_RANK", "0") == "0"
    return _RANKS[0].first_reason(error)


def lost_rank() -> str | None:
    """Why another process has ended, if one has: a signal that reaches this one may only be the launcher's answer.

    Empty where the launcher, or another process of this machine, says it.
    """
    return _RANKS[0].lost() if _RANKS else None


def is_connection_error(error: BaseException) -> bool:
    """Whether an operation between processes has failed, which says nothing about why."""
    if not _RANKS or not isinstance(error, RuntimeError):
        return False
    from torch.distributed import DistError

    return isinstance(error, DistError) or any(mark in str(error) for mark in _CONNECTION)


class Ranks:
    """The processes of the run, as this one sees them."""

    def __init__(self, timeout: int) -> None:
        from torch import distributed

        self.timeout, self.rank = timeout, distributed.get_rank()
        self.interval = min(max(timeout / 30, 0.25), 5.0)
        store = private("torch.distributed.distributed_c10d:_get_default_store")()
        # A connection each for the thread and for everybody else: an operation that waits blocks its connection.
        self._store, self._thread_store = store.clone(), store.clone()
        self._numbers = range(distributed.get_world_size())
        self._memory_kills = memory_kills()
        self._ending, self._claimed, self._told = threading.Event(), threading.Lock(), threading.Event()
        self._store_is_lost = self._launcher_says = False
        self._store.set(f"who/{self.rank}", json.dumps(asdict(this_process(self.rank))))
        self._store.set(f"beat/{self.rank}", f"0 {PROGRESS.report()}")
        self.peers = [Peer(**json.loads(text)) for text in self._read("who", self._store)]
        self._exits = Exits([peer for peer in self.peers if self._is_near(peer)])
        self._read("beat", self._store)
        for each in (self._store, self._thread_store):
            each.set_timeout(timedelta(seconds=timeout))
        self.limit(_NO_LIMIT)
        stop.when_requested(self._told.set)
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()
        self._answered = time.monotonic()
        if self.rank != 0 and not self._is_near(self.peers[0]):
            threading.Thread(target=self._watch_store, name="store", daemon=True).start()

    def limit(self, timeout: timedelta) -> None:
        """Set how long an operation between processes may take, also in groups within and across machines (HSDP)."""
        for group in private("torch.distributed.distributed_c10d:_world").pg_map:
            private("torch.distributed.distributed_c10d:_set_pg_timeout")(timeout, group)

    def finish(self) -> None:
        """No process waits for this one any more."""
        self._ending.set()
        self._thread.join(timeout=_GRACE_SECONDS)  # its last heartbeat comes before the word that ends them
        try:
            self._store.set(f"beat/{self.rank}", _DONE)
        except RuntimeError:
            return  # whoever has the store has finished as well

    def lost(self) -> str | None:
        """What another process has said, or that one of this machine is gone; nothing is waited for."""
        try:
            found = self._said(self._store) or self._dead(self._read("beat", self._store))
        except RuntimeError:
            return None
        if found is None:
            return None
        reason, says = self._publish(found)
        return reason if says else ""

    def first_reason(self, error: BaseException) -> tuple[str, bool]:
        """Publish what happened here, unless another process was earlier."""
        self._ending.set()
        if not self._claimed.acquire(blocking=False):
            time.sleep(2 * LAUNCHER_SECONDS)  # the thread is ending the process
        if not is_connection_error(error):
            own = f"{self.peers[self.rank]} has failed: {summary(error)}"
            reason, says = self._publish(own)
            return (str(error), True) if reason == own else (reason, says)
        give_up = threading.Timer(2 * self.timeout, self._give_up)
        give_up.daemon = True
        give_up.start()
        try:
            reason = self._diagnosis(error)
        except RuntimeError:
            what = f"the connection to the other processes was lost{when(PROGRESS.report())}"
            reason = self._store_lost() or str(Problem("processes", what, _next(), summary(error)))
        published = self._publish(reason)
        give_up.cancel()
        return published

    def _publish(self, reason: str) -> tuple[str, bool]:
        """The reason of the run's end, the first one that was published, and whether this process says it.

        One process of each machine does: the one that has published it, or the first to read it there. None does where
        the launcher knows more.
        """
        says = os.environ.get("LOCAL_RANK", "0") == "0"
        try:
            if not self._store_is_lost:
                published = json.loads(self._store.compare_set("reason", "", json.dumps([self.rank, reason])))
                publisher, reason = self.peers[published[0]], published[1]
                says = publisher.rank == self.rank or (not self._is_near(publisher) and self._reads_first())
        except RuntimeError:
            self._store_is_lost = True
        return reason, says and not self._launcher_says

    def _reads_first(self) -> bool:
        """Whether this process is the first of its machine."""
        mine, value = self.peers[self.rank], str(self.rank)
        return bool(self._store.compare_set(f"says/{mine.machine or mine.host}", "", value).decode() == value)

    def _diagnosis(self, error: BaseException) -> str:
        """Why a connection broke. Processes of other machines are watched for some heartbeats."""
        before = self._read("beat", self._store)
        deadline = time.monotonic() + max(3 * self.interval, _LEAST_WATCHED)
        while time.monotonic() < deadline:
            values = self._read("beat", self._store)
            if found := self._said(self._store) or self._dead(values):
                return found
            time.sleep(0.2)
        for peer, old, new in zip(self.peers, before, values, strict=True):
            if old == new and peer.rank != self.rank:
                return unreachable(peer, doing(new))
        what = "an operation between the processes failed although all of them answer"
        do = f"look at the network, and raise training.rank_timeout if a step is long; {_next()}"
        each = ", ".join(f"{peer}: {doing(value)}" for peer, value in zip(self.peers, values, strict=True))
        return str(Problem("processes", what, do, f"{summary(error)}; {each}"))

    def _watch(self) -> None:
        """The thread: beat, look at the others, and end the process where one of them is lost."""
        now = time.monotonic()
        beats = [_Beat(b"", now, 0.0) for _ in self.peers]
        count, looked = 0, now
        while not self._ending.wait(self.interval):
            count, now = count + 1, time.monotonic()
            if now - looked > 3 * self.interval + 1:
                for beat in beats:
                    beat.since = now  # this process itself was stopped, or its machine suspended
            looked, patience = now, _GRACE_SECONDS
            try:
                self._thread_store.set(f"beat/{self.rank}", f"{count} {PROGRESS.report()}")
                values = self._read("beat", self._thread_store)
                self._answered = time.monotonic()
                if stopped := self._stopped(beats, values):
                    self._end(stopped)
                found = self._said(self._thread_store) or self._dead(values)
                self._memory_kills = memory_kills()
            except RuntimeError:
                if (found := self._store_lost()) is None:
                    return
                self._store_is_lost = True
                patience = self.timeout  # what refused the connection may have been the launcher alone
            if found and not self._ending.wait(patience):
                self._end(found)

    def _watch_store(self) -> None:
        """A second thread: an operation on a store of another machine does not return once a cable is pulled."""
        looked = time.monotonic()
        while not self._ending.wait(self.interval):
            now = time.monotonic()
            if now - looked > 3 * self.interval + 1:
                self._answered = now  # this process itself was stopped, or its machine suspended
            looked = now
            if now - self._answered > self.timeout:
                self._store_is_lost = True
                self._end(unreachable(self.peers[0], PROGRESS.report()))
                return

    def _give_up(self) -> None:
        """The store, from which the reason was to come, does not answer any more."""
        print(f"\n{self._store_lost() or unreachable(self.peers[0], PROGRESS.report())}", file=sys.stderr, flush=True)
        os._exit(1)

    def _end(self, reason: str) -> None:
        """End the process from the thread: the main one waits in an operation that nothing interrupts."""
        if not self._claimed.acquire(blocking=False):
            return
        said, says = self._publish(reason)
        sys.stdout.flush()  # what is kept back for a file comes before the last line
        if says or not (stop.requested is not None or self._told.wait(LAUNCHER_SECONDS)):
            print(f"\n{said}", file=sys.stderr, flush=True)
        os._exit(1)

    def _read(self, name: str, store: Any) -> list[bytes]:
        values: list[bytes] = store.multi_get([f"{name}/{number}" for number in self._numbers])
        return values

    def _said(self, store: Any) -> str | None:
        return str(json.loads(store.get("reason"))[1]) if store.check(["reason"]) else None

    def _dead(self, values: Sequence[bytes]) -> str | None:
        """A process of this machine that has ended without having finished."""
        for peer, value in zip(self.peers, values, strict=True):
            if self._is_near(peer) and not value.startswith(_DONE) and peer.state() is None:
                code = self._exits.of(peer.rank)
                how = "" if code is None else f"exit code {code}" if code > 0 else f"signal {-code}"
                by_signal = code is not None and code < 0
                self._launcher_says = by_signal and SHARED in os.environ and not _restarts_left()
                memory = memory_kills() > self._memory_kills
                return ended_line(peer.rank, peer.host, how, doing(value), memory, _next())
        return None

    def _stopped(self, beats: Sequence[_Beat], values: Sequence[bytes]) -> str | None:
        """A process that has not answered for `training.rank_timeout`."""
        now = time.monotonic()
        for peer, beat, value in zip(self.peers, beats, values, strict=True):
            state, cpu = (peer.state() if self._is_near(peer) else None) or ("", 0.0)
            # A process in a long call into a library that keeps Python's lock cannot beat, and works.
            if value != beat.value or cpu > beat.cpu + 0.1:
                beat.value, beat.since, beat.cpu = value, now, cpu
            elif now - beat.since > self.timeout and not value.startswith(_DONE):
                what = f"{peer} has not answered for {self.timeout} s{when(doing(value))}"
                what += state and f" (process {peer.pid} is {state})"
                return f"{what}; look at its machine; training.rank_timeout sets how long the others wait; {_next()}"
        return None

    def _store_lost(self) -> str | None:
        """The store is that of rank 0's machine; None where that is this one, and its launcher has ended."""
        if self.rank == 0 or (_by_agent() and self._is_near(self.peers[0])):
            return None
        return unreachable(self.peers[0], PROGRESS.report())

    def _is_near(self, peer: Peer) -> bool:
        """Whether it is another process of this machine that can be looked at."""
        return peer.rank != self.rank and peer.machine == self.peers[self.rank].machine != ""


def summary(error: BaseException) -> str:
    """The first line of an error, with its class where it is not an expected one."""
    first = str(error).partition("\n")[0]
    return first if isinstance(error, FinetuneError) else f"{type(error).__name__}: {first}"


def unreachable(peer: Peer, doing: str) -> str:
    """The line about a process of another machine: whether it has ended cannot be seen from here."""
    return f"{peer} ended or cannot be reached{when(doing)}; {_next()}"


def _by_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _restarts_left() -> int:
    """How often torch's agent will start the processes again."""
    most, done = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    return most - done


def _next() -> str:
    """What happens, or is to be done, once a process was lost."""
    left = _restarts_left()
    return CONTINUE if left == 0 else f"the launcher starts it again (--max_restarts: {left} left)"
