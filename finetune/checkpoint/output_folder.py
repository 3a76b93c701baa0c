"""Write a folder that appears complete or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from finetune.errors import DiskError, Problem, WeightsError
from finetune.files import disk_named


@contextmanager
def new_folder(target: Path, needed: int | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; rename it to `target` on success, remove it on any exception.

    `target` must be absent or an empty folder. Raises WeightsError; DiskError, which names the `needed` bytes,
    for what its disk refuses inside.
    """
    shown, target = target, Path(target).absolute()
    check_output_free(target)
    try:
        with disk_named(shown, needed), temporary_folder(target) as temporary:
            yield temporary
            _sync(temporary)
            check_output_free(target)
            os.rename(temporary, target)  # replaces an empty folder
            _sync(target.parent)
    except DiskError as error:
        hidden = str(_temporary(target))
        problems = [replace(each, where=each.where.replace(hidden, str(shown))) for each in error.problems]
        raise DiskError(problems) from error


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Yield a folder beside `target` (`.NAME.partial`) for one process at a time, removed at the end if still there.

    A lock file beside it (`.NAME.lock`) marks it: its lock dies with the process, the file stays after a kill. So a
    folder with the file and without a living holder is what a killed process left, and is removed first. Anything else
    in its place, and a folder that another process is writing, is a WeightsError. Parents of `target` are made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    if temporary.is_symlink() or (temporary.exists() and not temporary.is_dir()):
        do = "remove it yourself, or name another output"
        raise WeightsError(Problem(str(temporary), "a file or link blocks the temporary output folder", do))
    with _locked(target) as was_marked:
        if temporary.exists():
            _remove_left_by_kill(temporary, was_marked)
        temporary.mkdir()
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _temporary(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"


def _remove_left_by_kill(temporary: Path, was_marked: bool) -> None:
    names = sorted(path.name for path in temporary.iterdir())
    if names and not was_marked:
        what = "a folder that no killed run has left (it has no lock file) blocks the temporary output folder"
        do = "remove it yourself, or name another output"
        raise WeightsError(Problem(str(temporary), what, do, got=", ".join(names[:3])))
    shutil.rmtree(temporary)


def check_output_free(target: Path) -> None:
    """Raise WeightsError unless `target` is absent or an empty folder."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise WeightsError(Problem(str(target), "output exists and is not a folder", "name a new folder"))
    if target.is_dir():
        held = sorted(path.name for path in target.iterdir())
        if held:
            do = "name a new folder, or remove this one yourself"
            raise WeightsError(Problem(str(target), "output folder is not empty", do, got=", ".join(held[:3])))


@contextmanager
def _locked(target: Path) -> Iterator[bool]:
    """Hold the lock on writing `target`. Yields whether the lock file was there before, left by a killed process."""
    path = target.parent / f".{target.name}.lock"
    while True:
        was_there = path.exists()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            do = "wait for it, or name another folder"
            raise WeightsError(Problem(str(target), "another process is writing this folder", do)) from None
        # The holder before us may have removed the file between our open and our lock.
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            break
        os.close(descriptor)
    try:
        yield was_there
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Wait until the disk has the contents of every file in the folder."""
    for file in folder.iterdir():
        _sync(file)


def _sync(folder: Path) -> None:
    """Make a folder's entries, or a file's contents, survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
