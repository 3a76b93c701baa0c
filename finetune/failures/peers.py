"""The other processes of a run: who they are, whether and how they have ended, and how a message says it."""

import os
import select
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import psutil

from finetune.progress import PROGRESS

_STATUS_SECONDS = 0.5


@dataclass(frozen=True)
class Peer:
    """A process of the run. `machine` is empty where nothing can be said about whose processes can be looked at."""

    rank: int
    host: str
    pid: int
    machine: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def state(self) -> tuple[str, float] | None:
        """Of a process of this machine: its state, and the seconds it has worked; None where it has ended."""
        try:
            process = psutil.Process(self.pid)
            state, cpu = process.status(), process.cpu_times()
        except psutil.NoSuchProcess:
            return None
        return None if state == psutil.STATUS_ZOMBIE else (str(state), cpu.user + cpu.system)


def this_process(rank: int) -> Peer:
    """This process, with a name of its machine that only processes that see each other's numbers share."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            machine = f"{file.read().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        machine = ""
    return Peer(rank, socket.gethostname(), os.getpid(), machine)


def doing(beat: bytes) -> str:
    """What a process was doing at a heartbeat; in training the step of this process, which is not older."""
    text = beat.decode().partition(" ")[2]
    return PROGRESS.report() if PROGRESS.step is not None and text.startswith("training") else text


class Exits:
    """How processes of this machine end, which can be read only until their launcher has done so: on Linux."""

    def __init__(self, peers: Iterable[Peer]) -> None:
        self._codes: dict[int, int] = {}
        self._known = {peer.rank: threading.Event() for peer in peers}
        for peer in peers:
            with suppress(OSError, AttributeError):  # gone already, or not Linux
                opened = os.pidfd_open(peer.pid)
                threading.Thread(target=self._wait, args=(peer, opened), name="exits", daemon=True).start()

    def of(self, rank: int) -> int | None:
        """The exit code of a process that has ended, minus the signal of one that was killed; None: not known."""
        self._known[rank].wait(_STATUS_SECONDS)
        return self._codes.get(rank)

    def _wait(self, peer: Peer, opened: int) -> None:
        select.select([opened], [], [])
        with suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{peer.pid}/stat", encoding="utf-8", errors="replace") as file:
                status = int(file.read().rpartition(")")[2].split()[49])  # 0 also where it must not be read
            if status:
                self._codes[peer.rank] = os.waitstatus_to_exitcode(status)
        self._known[peer.rank].set()
        os.close(opened)
