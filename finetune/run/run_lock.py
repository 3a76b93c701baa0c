"""One training process at a time in a run folder, by a lock that dies with its process."""

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from finetune.errors import Problem, RunError

LOCK_FILE = ".lock"
_SECONDS_TO_WAIT, _SECONDS_BETWEEN_LOOKS = 300, 0.5
_held: dict[Path, int] = {}
"""Descriptors by lock file. A record lock ends when its process closes any descriptor of the file."""


def lock_run(folder: Path) -> None:
    """Hold the run folder, which is made if need be, until this process ends or `unlock_run`.

    A process that is about to end is waited for. Raises RunError with pid and host of one that is not. A record lock,
    unlike `flock`, is not passed on to forked workers that outlive this process, and holds between the machines of a
    network file system.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / LOCK_FILE
    if path in _held:
        raise _is_held(folder, f"this process, pid {os.getpid()} on {socket.gethostname()}")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    waited_until = time.monotonic() + _SECONDS_TO_WAIT
    while not _locked(descriptor, path):
        holder, ends = _read(descriptor)
        if not ends or time.monotonic() > waited_until:
            os.close(descriptor)
            raise _is_held(folder, holder)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    _held[path] = descriptor
    _write(descriptor, ends=False)


def _locked(descriptor: int, path: Path) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        os.close(descriptor)
        what, do = f"the folder cannot be locked ({error.strerror})", "put output_dir on a file system with locks"
        raise RunError(Problem(str(path), what, do)) from error
    return True


def say_that_it_ends(folder: Path) -> None:
    """Let the next process wait for this one, which has been told to stop and writes its last checkpoint."""
    descriptor = _held.get(folder.resolve() / LOCK_FILE)
    if descriptor is not None:
        _write(descriptor, ends=True)


def unlock_run(folder: Path) -> None:
    """Give the run folder free again; does nothing where it is not held."""
    descriptor = _held.pop(folder.resolve() / LOCK_FILE, None)
    if descriptor is not None:
        os.close(descriptor)


def _is_held(folder: Path, holder: str) -> RunError:
    do = "wait until it has ended, end it, or choose another output_dir"
    return RunError(Problem(str(folder), "another process is training in this folder", do, got=holder))


def _write(descriptor: int, ends: bool) -> None:
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "ends": ends}).encode()
    with suppress(OSError):  # on a full disk the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)


def _read(descriptor: int) -> tuple[str, bool]:
    """Who holds the lock, as that process has written it, and whether it is about to end."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"pid {int(holder['pid'])} on {holder['host']}", holder["ends"] is True
    except (ValueError, KeyError, TypeError):
        return "a process that has not said which one it is", False
