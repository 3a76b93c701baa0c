"""One training process at a time in a run folder, by a lock that dies with its process."""

import fcntl
import json
import os
import socket
from pathlib import Path

from finetune.errors import Problem, RunError

LOCK_FILE = ".lock"
_held: dict[Path, int] = {}
"""Descriptors by lock file. A record lock ends when its process closes any descriptor of the file."""


def lock_run(folder: Path) -> None:
    """Hold the run folder, which is made if need be, until this process ends or `unlock_run`.

    Raises RunError with pid and host of the process that holds it. A record lock, unlike `flock`, is not passed on to
    forked workers that outlive this process, and holds between the machines of a network file system.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / LOCK_FILE
    if path in _held:
        raise _is_held(folder, f"this process, {_me()}")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _read(descriptor)
        os.close(descriptor)
        if isinstance(error, BlockingIOError | PermissionError):
            raise _is_held(folder, holder) from None
        what, do = f"the folder cannot be locked ({error.strerror})", "put output_dir on a file system with locks"
        raise RunError(Problem(str(path), what, do)) from error
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
    _held[path] = descriptor


def unlock_run(folder: Path) -> None:
    """Give the run folder free again; does nothing where it is not held."""
    descriptor = _held.pop(folder.resolve() / LOCK_FILE, None)
    if descriptor is not None:
        os.close(descriptor)


def _is_held(folder: Path, holder: str) -> RunError:
    do = "wait until it has ended, end it, or choose another output_dir"
    return RunError(Problem(str(folder), "another process is training in this folder", do, got=holder))


def _me() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _read(descriptor: int) -> str:
    """Who holds the lock, as that process has written it."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"pid {int(holder['pid'])} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has not said which one it is"
