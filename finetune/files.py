"""Write files atomically, and say which disk has refused what."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.errors import DiskError, disk_problem, free_bytes


@contextmanager
def disk_named(path: Path, needed: int | None = None, elsewhere: str = "write to another disk") -> Iterator[None]:
    """Raise DiskError with `path`, needed and free bytes in place of what any package raises for its disk.

    Enter it outside of what removes half-written files: the free bytes are then those that the write had.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskError) or (problem := disk_problem(error, path, needed, elsewhere)) is None:
            raise
        raise DiskError(problem) from error


def require_free_disk(path: Path, needed: int, elsewhere: str = "write to another disk") -> None:
    """Refuse with DiskError when the disk of `path` (which need not exist yet) has less than `needed` bytes free."""
    free = free_bytes(path)
    if free is not None and free < needed:
        with disk_named(path, needed, elsewhere):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_atomically(path: Path, write: Callable[[Path], object], needed: int | None = None) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: a kill leaves the old or the new file.

    `needed`: its size in bytes, for the DiskError.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with disk_named(path, needed):
        try:
            write(temporary)
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    content = text.encode("utf-8")
    write_atomically(path, lambda temporary: temporary.write_bytes(content), len(content))


def as_json(value: Any) -> str:
    """JSON text as `write_json` writes it; NaN and infinity raise ValueError, as they are not JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, as_json(value))
