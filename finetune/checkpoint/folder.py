"""A folder that appears whole or not at all, and a check of the free space."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import Problem, WeightsError


class UnfinishedError(WeightsError):
    """A refusal to go on with what lies unfinished there, which stays as it was found."""


@contextmanager
def new_folder(target: Path, resumable: bool = False, resume: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; rename it to `target` on success, remove it on any exception.

    `target` must be absent or an empty folder. What a killed process left behind is removed first: a lock that dies
    with its process tells a dead writer from a live one. A caller that can go on from it says so by `resumable` (an
    interrupt by the keyboard then leaves the same as a kill), and by `resume` that it will. Raises WeightsError.
    """
    target = Path(target).absolute()
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.partial"
    if temporary.is_symlink() or (temporary.exists() and not temporary.is_dir()):
        do = "remove it yourself, or name another folder"
        raise WeightsError(Problem(str(temporary), "stands where the unfinished output would, and is no folder", do))
    with locked(target):
        if temporary.exists() and not resume:
            shutil.rmtree(temporary)
        temporary.mkdir(exist_ok=resume)
        try:
            yield temporary
            _sync(temporary)
            refuse_existing(target)
            os.rename(temporary, target)  # replaces an empty folder
        except BaseException as error:
            if not (resumable and isinstance(error, KeyboardInterrupt | UnfinishedError)):
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(target.parent)


def refuse_existing(target: Path) -> None:
    """Raise WeightsError unless `target` is absent or an empty folder."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise WeightsError(Problem(str(target), "output exists and is not a folder", "name a new folder"))
    if target.is_dir():
        held = sorted(path.name for path in target.iterdir())
        if held:
            do = "name a new folder, or remove this one yourself"
            raise WeightsError(Problem(str(target), "output folder is not empty", do, got=", ".join(held[:3])))


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the right to write `target`. The lock file goes away with the last holder, also after a kill."""
    path = target.parent / f".{target.name}.lock"
    while True:
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
        yield
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


def require_free_disk(folder: Path, nbytes: int, unfinished: Path | None = None) -> None:
    """Refuse with WeightsError when the disk of `folder` (which need not exist yet) has less than `nbytes` free.

    What lies in the folder `unfinished` is taken for free: it is written over or removed.
    """
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    held = unfinished.rglob("*") if unfinished is not None and unfinished.is_dir() else ()
    free = shutil.disk_usage(existing).free + sum(file.lstat().st_blocks * 512 for file in held)
    if free < nbytes:
        do = "free space or write to another disk"
        got = f"{free / 2**30:.2f} GiB free"
        raise WeightsError(Problem(str(folder), f"too little disk: {nbytes / 2**30:.2f} GiB are needed", do, got))
