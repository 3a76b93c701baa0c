"""The expected errors, and those of other packages that become one. Each says where, what is wrong, what to do."""

import errno
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROLS = (*(code for code in range(0x20) if chr(code) != "\n"), *range(0x7F, 0xA0), 0x2028, 0x2029, *_BIDI)
_ESCAPED = {code: f"\\u{code:04x}" for code in _CONTROLS}
_ON_ONE_LINE = {**_ESCAPED, ord("\n"): "\\n"}


def printable(text: str) -> str:
    """Text of files, names and rows on one line, without characters that a terminal or a browser obeys."""
    return text.translate(_ON_ONE_LINE)


@dataclass(frozen=True)
class Problem:
    """One problem: `where` (file:line: key, file, tensor name ...), `what` is wrong, what was `got`, what to `do`."""

    where: str
    what: str
    do: str
    got: str | None = None

    def __str__(self) -> str:
        got = "" if self.got is None else f"; got {self.got}"
        # What files and rows hold must not reach the terminal as commands.
        return f"{printable(self.where)}: " + f"{self.what}{got}; {self.do}".translate(_ESCAPED)


class FinetuneError(Exception):
    """Base of all expected errors. Carries every problem found, not only the first; printed one a line."""

    exit_code = 1

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


class RecipeError(FinetuneError):
    """The recipe (or a command line override) is wrong. Found before torch is imported."""

    exit_code = 2


class DataError(FinetuneError):
    """A row, a template or a data file is wrong."""


class WeightsError(FinetuneError):
    """A checkpoint, an adapter or a loaded model is not what it should be."""


class RunError(FinetuneError):
    """Training went wrong while running (a non-finite loss, an audit that differs from the recipe)."""


class DiskError(FinetuneError):
    """A disk is full, read-only or failing, a quota is used up, or a folder does not admit this user."""


_BROKEN = (errno.EIO, errno.EREMOTEIO, errno.ESTALE)
_NO_PERMISSION = (errno.EACCES, errno.EPERM)
_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, *_BROKEN, *_NO_PERMISSION)

# What packages that do not raise OSError, or raise it without a number, say in its place.
_NUMBER = re.compile(r"\(os error (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)  # Rust; pyarrow and shutil
_SAYS = {
    **{os.strerror(number): number for number in _OF_A_DISK if number != errno.EPERM},
    "database or disk is full": errno.ENOSPC,  # SQLite
    "disk I/O error": errno.EIO,
}
_MUCH = 2**20  # bytes that are free on a disk which is hardly full
# torch and numpy count what was written and do not say why it is less: nearly always a full disk.
_WROTE_LESS = re.compile(r"unexpected pos \d+ vs \d+|\d+ requested and \d+ written")


def disk_problem(
    error: BaseException, path: Path, needed: int | None = None, elsewhere: str = "write to another disk"
) -> Problem | None:
    """What a disk has refused while `path` was written, whatever package raised `error`; None for any other error.

    `needed`: bytes that were to be written, or at least those, if known. `elsewhere`: how to name another place.
    """
    if isinstance(error, FinetuneError):
        return error.problems[0] if isinstance(error, DiskError) else None
    number = _number(error)
    if number is None:
        return None if error.__cause__ is None else disk_problem(error.__cause__, path, needed, elsewhere)
    own = str(written_path(error) or path)  # it may have been something that is read meanwhile
    if number in _NO_PERMISSION:
        return Problem(own, "this user may not read or write it", f"change its permissions, or {elsewhere}")
    if number == errno.EROFS:
        do = f"mount it for writing (the system makes a failing disk read-only: see dmesg), or {elsewhere}"
        return Problem(str(path), "the disk is read-only", do)
    if number in _BROKEN:
        what = f"a disk fails while this is written ({os.strerror(number)})"
        return Problem(own, what, f"see dmesg, and {elsewhere}")
    return _full(number, path, needed, elsewhere)


def _full(number: int, path: Path, needed: int | None, elsewhere: str) -> Problem:
    free = free_bytes(path)
    got = None if free is None else f"{_distinct(free, needed)} free"
    need = "" if needed is None else f": {_distinct(needed, free)} are needed"
    if number == errno.EDQUOT:
        what, do = "your quota on this disk is used up" + need, "remove files of yours from it"
    elif number == errno.EFBIG:
        what, do = "the file would be larger than is allowed here" + need, "raise the limit (ulimit -f shows it)"
    elif no_inode_free(path):
        what, do, got = (
            "the disk has no inode left for another file (see df -i)",
            "remove files from it",
            "0 inodes free",
        )
    elif free is None or (needed is not None and needed > free):
        what, do = "there is not enough space on the disk" + need, "free space on it"
    elif free < _MUCH:
        what, do = f"the disk is full: more than {readable_size(free)} are needed", "free space on it"
    else:
        what = "the disk is full" + need
        do = "free space on it (a quota, a reserve or a limit (ulimit -f) can leave less than it reports)"
    return Problem(str(path), what, f"{do}, or {elsewhere}", got)


def _distinct(nbytes: int, other: int | None) -> str:
    """The size in a unit that fits; in bytes where it would read as the other one does."""
    text = readable_size(nbytes)
    return f"{nbytes} bytes" if other not in (None, nbytes) and text == readable_size(other or 0) else text


def _number(error: BaseException) -> int | None:
    """The system's error number where it is one of a disk."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in _OF_A_DISK else None
    # Not of every class: others quote what they read, and rows may hold these words.
    if not (isinstance(error, OSError | RuntimeError) or type(error) is Exception or _by_name(error)):
        return None
    text = str(error)
    if found := _NUMBER.search(text):
        number = int(found[1] or found[2])
        return number if number in _OF_A_DISK else None
    if _WROTE_LESS.search(text):
        return errno.ENOSPC
    return next((number for words, number in _SAYS.items() if words in text), None)


def _by_name(error: BaseException) -> bool:
    """Classes of packages that are not imported here."""
    return type(error).__name__ in ("SafetensorError", "OperationalError")


def written_path(error: BaseException) -> Path | None:
    """The file that an error names; of a copy its target, whichever of the two could not be used."""
    names = [getattr(error, name, None) for name in ("filename2", "filename")]
    return next((Path(os.fsdecode(name)) for name in names if isinstance(name, str | bytes | os.PathLike)), None)


def free_bytes(path: Path) -> int | None:
    """Bytes that this user may still write on the disk of `path`, which need not exist; None if it does not say."""
    try:
        return shutil.disk_usage(_existing(path)).free
    except OSError:
        return None


def no_inode_free(path: Path) -> bool:
    """Whether the disk has a table of files, and it is full."""
    try:
        disk = os.statvfs(_existing(path))
    except OSError:
        return False
    return disk.f_files > 0 and disk.f_favail == 0


def _existing(path: Path) -> Path:
    path = Path(path).absolute()
    return next((folder for folder in (path, *path.parents) if os.path.exists(folder)), path)


def readable_size(nbytes: int) -> str:
    """Bytes in the unit that fits."""
    for unit, width in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= width:
            return f"{nbytes / width:.2f} {unit}"
    return f"{nbytes} bytes"


def _standard_output() -> Path:
    """The file that the output goes to: the only one that is written without a name."""
    try:
        return Path(os.readlink("/dev/fd/1"))
    except OSError:
        return Path("standard output")


def as_expected(error: Exception) -> FinetuneError:
    """The error to print: one of ours, of a disk, or an OSError about a path. Any other is raised again."""
    if isinstance(error, FinetuneError):
        return error
    path = written_path(error)
    if problem := disk_problem(error, path or _standard_output()):
        return DiskError(problem)
    if not isinstance(error, OSError) or path is None:
        raise error
    # Without a number it is one of ours: a FIFO or a device in place of a file, or a NUL in a name.
    do = "check that its folder exists and can be written to" if error.errno else "name a regular file"
    return FinetuneError(Problem(str(path), f"cannot be accessed ({error.strerror})", do))
