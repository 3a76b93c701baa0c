"""Read regular files only; write files atomically, and say which disk has refused what."""

import errno
import io
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from finetune.errors import DiskError, disk_problem, free_bytes

MAX_JSON_BYTES = 1 << 25
"""No JSON file that is read as a whole is larger (32 MiB): as Python objects it takes up to 25 times as much memory."""

_KINDS = {
    stat.S_IFIFO: "a FIFO or pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a block device",
    stat.S_IFDIR: "a folder",
}
_NO_NAME = "no file can have this name: it has a NUL byte, or half of a surrogate pair"


class NotRegularError(OSError):
    """A path that names no regular file: a folder, FIFO, socket or device, a file of the kernel, or a NUL byte."""

    def __init__(self, path: str | os.PathLike[str], what: str) -> None:
        super().__init__(0, what, os.fspath(path))


def regular_descriptor(path: str | os.PathLike[str]) -> int:
    """A descriptor of a regular file, or of a link to one, for reading; `NotRegularError` for anything else, at once.

    The kind is that of the open file, so that nothing can be put in its place in between. Never waits for the writer
    of a FIFO.
    """
    check_regular(path)  # opening a device can do something to it
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_kind(path, os.fstat(descriptor))
        os.set_blocking(descriptor, True)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_regular(path: str | os.PathLike[str]) -> io.FileIO:
    """The same as a file, unbuffered."""
    return io.FileIO(regular_descriptor(path), "rb")


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise as `open_regular` does, for a file that another library opens by its name."""
    try:
        _check_kind(path, os.stat(path))
    except ValueError as error:
        raise NotRegularError(path, _NO_NAME) from error


def check_all_regular(folder: str | os.PathLike[str]) -> None:
    """The same for every entry of a folder that is no folder, for a library that opens what it finds in it."""
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if os.path.exists(path) and not os.path.isdir(path):
            check_regular(path)


def _check_kind(path: str | os.PathLike[str], about: os.stat_result) -> None:
    if not stat.S_ISREG(about.st_mode):
        kind = _KINDS.get(stat.S_IFMT(about.st_mode), "something else")
        raise NotRegularError(path, f"it is {kind}, not a regular file")
    if about.st_dev in _kernel_devices():
        raise NotRegularError(path, "it is a file that the kernel makes up (/proc, /sys), not a regular file")


@cache
def _kernel_devices() -> frozenset[int]:
    return frozenset(os.stat(folder).st_dev for folder in ("/proc", "/sys") if os.path.ismount(folder))


def read_regular(path: str | os.PathLike[str], limit: int = MAX_JSON_BYTES) -> bytes:
    """The content of a regular file; `OSError` if it is none, or has more than `limit` bytes."""
    with open_regular(path) as file:
        content = bytearray()
        while piece := file.read(min(1 << 20, limit + 1 - len(content))):
            content += piece
    if len(content) > limit:
        raise OSError(0, f"it is larger than {limit:,} bytes", os.fspath(path))
    return bytes(content)


def read_text(path: str | os.PathLike[str], limit: int = MAX_JSON_BYTES) -> str:
    """The same as text; `UnicodeDecodeError` (a ValueError) if it is not UTF-8."""
    return read_regular(path, limit).decode("utf-8")


def read_json(path: str | os.PathLike[str], limit: int = MAX_JSON_BYTES) -> Any:
    """The value of a JSON file; `OSError` as `read_regular`, `ValueError` for what cannot be read as JSON."""
    return parse_json(read_regular(path, limit))


def parse_json(content: bytes | str) -> Any:
    """The value of JSON text; `ValueError` for all that cannot be read, nested too deeply included."""
    try:
        return json.loads(content if isinstance(content, str) else content.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


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
