"""Start commands in a warm process, kill them at random moments, and start the same command until it ends."""

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEED = os.environ.get("FAULTS_SEED", date.today().isoformat())
"""Of all random moments and places: other ones each day; the variable repeats those of another day."""
SECONDS = 180
"""A command that takes longer hangs."""
POLL_SECONDS = 0.02


@dataclass
class Ended:
    """A command that has ended: `code` is minus the signal of one that was killed."""

    code: int
    output: str
    seconds: float


@dataclass
class Running:
    """A command in a process of its own."""

    commands: "Commands"
    number: int
    log: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def send(self, number: int) -> None:
        """A signal to the process alone."""
        with suppress(ProcessLookupError):
            os.kill(self.number, number)

    def kill(self) -> None:
        """SIGKILL to the process and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.number, signal.SIGKILL)

    def has_ended(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        watched = os.pidfd_open(self.number)
        try:
            return bool(select.select([watched], [], [], max(seconds, 0))[0])
        finally:
            os.close(watched)

    def wait(self) -> Ended:
        """Wait for its end; AssertionError with its output where it hangs."""
        hangs = not self.has_ended(SECONDS)
        if hangs:
            self.kill()
        code = self.commands.ask(wait=self.number)
        assert not hangs, f"seed {SEED}: it did not end within {SECONDS} s:\n{self.output}"
        return Ended(code, self.output, time.monotonic() - self.started)


class Commands:
    """Commands of `finetune` that start at once (`server.py`)."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._count = folder, 0
        words = [sys.executable, "-m", "tests.faults.server"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._server = subprocess.Popen(words, cwd=ROOT, text=True, start_new_session=True, **pipes)

    def ask(self, **request: Any) -> int:
        """The server's answer."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def start(self, folder: Path, *words: object, **environment: str) -> Running:
        """Start a command in a folder."""
        self._count += 1
        log = self.folder / f"{self._count}.log"
        job = {"words": list(map(str, words)), "folder": str(folder), "log": str(log), "environment": environment}
        return Running(self, self.ask(**job), log)

    def run(self, folder: Path, *words: object, **environment: str) -> Ended:
        """Run a command to its end."""
        return self.start(folder, *words, **environment).wait()

    def close(self) -> None:
        """End the server, and with it whatever still runs."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._server.wait(10)
        self._server.kill()
        self._server.wait()


def randomness(name: str) -> random.Random:
    """The random moments of one test; its name is part of the seed, so each can be repeated alone."""
    return random.Random(f"{SEED} {name}")


def succeed(ended: Ended) -> Ended:
    """Assert that a command ended well."""
    assert ended.code == 0, f"seed {SEED}: exit code {ended.code}:\n{ended.output}"
    assert "Traceback" not in ended.output, f"seed {SEED}:\n{ended.output}"
    return ended


def wait_for(moment: Callable[[], bool], running: Running, seconds: float = POLL_SECONDS) -> bool:
    """Look every so many seconds until `moment` is true; False where the command ends before."""
    while not moment():
        if running.has_ended(seconds):
            return moment()
    return True


def kill_at(running: Running, seconds: float) -> bool:
    """SIGKILL after so many seconds; False where the command ended before, which must be well."""
    killed = not running.has_ended(seconds)
    running.kill()
    ended = running.wait()
    if ended.code == -signal.SIGKILL:
        return killed
    succeed(ended)
    return False


def files_of(folder: Path, leave_out: Sequence[str] = ()) -> dict[str, bytes]:
    """Relative name -> content of every file below a folder, but those of these names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in leave_out)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_same_files(found: dict[str, bytes], wanted: dict[str, bytes], how: str) -> None:
    """The same names with the same bytes."""
    missing, more = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    assert not missing | more, f"seed {SEED}, {how}: without {sorted(missing)}, with {sorted(more)}"
    others = [name for name in wanted if found[name] != wanted[name]]
    assert not others, f"seed {SEED}, {how}: other bytes in {others}"


@contextmanager
def disk_of(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A disk of `size` bytes in memory at `folder`; gives a function that resizes it. PermissionError without root."""
    folder.mkdir(parents=True, exist_ok=True)

    def mount(*words: str) -> None:
        done = subprocess.run(["mount", *words, str(folder)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise PermissionError(done.stderr.strip())

    if shutil.which("mount") is None:
        raise PermissionError("there is no program mount")
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    try:
        yield lambda size: mount("-o", f"remount,size={size}")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def some_short(values: Sequence[Any], short: int) -> list[Any]:
    """Parameters of which `make test` takes only so many, spread over all, and `make test-faults` every one."""
    taken = {round((number + 0.5) * len(values) / short - 0.5) for number in range(short)}
    return [
        pytest.param(value, id=str(value), marks=() if number in taken else pytest.mark.faults)
        for number, value in enumerate(values)
    ]
