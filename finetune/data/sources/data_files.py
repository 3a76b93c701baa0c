"""The files that a `path` of the recipe means (a file, a glob, a folder of `datasets.save_to_disk`), and their bytes.

Files are decompressed while they are read, the position in them is kept, and damage is a `FileError`.
"""

import glob
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa

from finetune.data.row_errors import FileError, shown
from finetune.data.sources.bounds import Expansion
from finetune.errors import DataError, Problem
from finetune.files import NotRegularError, open_regular, read_json, regular_descriptor
from finetune.recipe.row_formats import looks_like_hub_id

BUFFER = 1 << 20
COPY_AGAIN = "copy or download it again"
_SAVE_AGAIN = "save or copy the folder again"
_SHOWN = 20  # names in a message
_ZSTD_PIECE = 1 << 13  # bytes; what pyarrow has unpacked of a piece is lost when the piece breaks
_MAGIC = {
    b"\x1f\x8b": ("gzip", "add .gz to its name"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "add .zst to its name"),
    b"PAR1": ("Parquet", "name it .parquet"),
    b"ARROW1": ("Arrow", "name it .arrow"),
    b"PK\x03\x04": ("ZIP", "unpack it"),
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8"),
}
ByteStream: TypeAlias = "io.BufferedReader[Any]"
_BOM = b"\xef\xbb\xbf"


@dataclass
class Place:
    """Where a reader is: `number` as in `Row` (0 before the first), `done` bytes of the file on disk."""

    number: int = 0
    done: int = 0


class _Counted(io.FileIO):
    """A file that keeps the place."""

    place: Place

    def readinto(self, buffer: Any, /) -> Any:
        count = super().readinto(buffer)
        self.place.done += count or 0
        return count


class _Unpacked(io.RawIOBase):
    """The output of a decompressor as soon as it is there, so that all before a damaged place is read."""

    def __init__(self, read: Callable[[int], bytes], expansion: Expansion) -> None:
        self._read = read
        self._expansion = expansion

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)
        try:
            piece = self._read(len(view))
        except EOFError as error:
            raise FileError("the compressed file is truncated", COPY_AGAIN) from error
        except (OSError, zlib.error) as error:
            if "Truncated" in str(error):
                raise FileError("the compressed file is truncated", COPY_AGAIN) from error
            what = "not the format of its suffix, or damaged"
            raise FileError(what, f"{COPY_AGAIN}, or give it the right suffix", str(error)) from error
        self._expansion.add(len(piece))
        view[: len(piece)] = piece
        return len(piece)


@contextmanager
def opened(path: str, packed: str | None, place: Place) -> Iterator[ByteStream]:
    """The unpacked bytes of a file, after a byte order mark if there is one; `packed` is `.gz`, `.zst` or None.

    `FileError` if the file is of another kind than its name says.
    """
    with _Counted(regular_descriptor(path)) as raw:
        raw.place = place
        stream: ByteStream = io.BufferedReader(raw, BUFFER)
        size = os.fstat(raw.fileno()).st_size
        if packed == ".gz":
            unpacked = _Unpacked(gzip.GzipFile(fileobj=stream).read1, Expansion(size, Expansion.GZIP))
            stream = io.BufferedReader(unpacked, BUFFER)
        elif packed == ".zst":
            read = pa.CompressedInputStream(stream, "zstd").read
            unpacked = _Unpacked(lambda wanted: read(min(wanted, _ZSTD_PIECE)), Expansion(size))
            stream = io.BufferedReader(unpacked, BUFFER)
        head = stream.peek(8)[:8]
        for magic, (kind, do) in _MAGIC.items():
            if head.startswith(magic):
                raise FileError(f"this is {kind}, not what its name says", do)
        if head.startswith(_BOM):
            stream.read(len(_BOM))
        yield stream


_TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_TABLES = (".parquet", ".arrow")
_PACKED = (".gz", ".zst")
SAVED = "save_to_disk"
_SUFFIXES = f"{', '.join(_TEXT)} (each also with {' or '.join(_PACKED)}), {', '.join(_TABLES)}"
_NAME_ONE = "give a file, a glob such as data/*.jsonl, or a folder of datasets.save_to_disk"


@dataclass(frozen=True)
class DataFile:
    """A file, or a `save_to_disk` folder: `kind` is the suffix that decides the reader (or `SAVED`), `packed` .gz,
    .zst or None. `parts`: each file whose bytes are read, in order, with its size."""

    path: str
    kind: str
    packed: str | None
    parts: dict[str, int] = field(hash=False)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(self.parts.values())


def find_files(path: str) -> list[DataFile]:
    """The files in the order they are read (a glob's: sorted by name); `DataError` names all that cannot be."""
    is_glob = any(character in path for character in "*?[") and not os.path.lexists(path)
    paths = _matches(path) if is_glob else [path]
    files: list[DataFile] = []
    problems: list[Problem] = []
    for file_path in paths:
        try:
            files.append(_data_file(file_path))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return files


def _matches(pattern: str) -> list[str]:
    paths = sorted(glob.glob(pattern, recursive=True))
    saved = [path for path in paths if _is_saved(path)]
    inside = tuple(os.path.join(folder, "") for folder in saved)
    matches = [path for path in paths if not path.startswith(inside) and (not os.path.isdir(path) or path in saved)]
    if not matches:
        raise _error(pattern, "no file matches", _NAME_ONE, _working_directory())
    return matches


def _working_directory() -> str:
    return f"working directory {os.getcwd()}"


def _is_saved(path: str) -> bool:
    return os.path.lexists(os.path.join(path, "state.json"))


def _error(path: str, what: str, do: str, got: str | None = None) -> DataError:
    return DataError(Problem(where=path, what=what, do=do, got=got))


def _data_file(path: str) -> DataFile:
    if not os.path.exists(path):
        if os.path.islink(path):
            raise _error(path, "a link to a file that does not exist", "fix the link", os.readlink(path))
        do = "give the path of a data file, relative to the folder the command is run in"
        if looks_like_hub_id(path):
            do += "; a data set on the Hugging Face hub is named by id instead of path"
        raise _error(path, "no such data file", do, _working_directory())
    if os.path.isdir(path):
        return _saved_folder(path)
    _check_readable(path)
    kind, packed = _kind(path)
    if kind in _TEXT and not packed:
        _check_no_hole(path)
    return DataFile(path, kind, packed, {path: os.path.getsize(path)})


def _kind(path: str) -> tuple[str, str | None]:
    stem, suffix = os.path.splitext(path)
    packed = suffix.lower() if suffix.lower() in _PACKED else None
    kind = (os.path.splitext(stem)[1] if packed else suffix).lower()
    if kind in _TEXT or (kind in _TABLES and not packed):
        return kind, packed
    if kind in _TABLES:
        raise _error(path, f"{kind} files are read as they are, not packed", "unpack it", _suffix(path))
    raise _error(path, "the suffix does not say what kind of file this is", f"use one of {_SUFFIXES}", _suffix(path))


def _suffix(path: str) -> str:
    suffix = "".join(Path(path).suffixes[-2:])
    return f"suffix {suffix}" if suffix else "no suffix"


def _check_readable(path: str) -> None:
    try:
        os.close(regular_descriptor(path))
    except NotRegularError as error:
        raise _error(path, str(error.strerror), _NAME_ONE) from error
    except OSError as error:
        raise _error(path, f"cannot be read ({error.strerror})", "check that it exists and can be read") from error


def _check_no_hole(path: str) -> None:
    """Refuse text with a hole, which a crash leaves: it reads as NUL bytes, and may be of any length."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size and hasattr(os, "SEEK_HOLE") and (hole := os.lseek(file.fileno(), 0, os.SEEK_HOLE)) < size:
            raise _error(path, f"nothing was written from byte {hole:,} on (a hole)", COPY_AGAIN, f"{size:,} bytes")


def _saved_folder(path: str) -> DataFile:
    if os.path.lexists(os.path.join(path, "dataset_dict.json")):
        names = [_plain_name(path, "dataset_dict.json", name) for name in _load(path, "dataset_dict.json", "splits")]
        do = f"give the folder of one: {' or '.join(os.path.join(path, name) for name in names[:_SHOWN])}"
        raise _error(path, "is a folder of several splits", do, ", ".join(names[:_SHOWN]))
    if not _is_saved(path):
        raise _error(path, "is a folder", f"write a glob, such as {os.path.join(path, '*.jsonl')}")
    if _load(path, "state.json", "_indices_data_files"):
        raise _error(path, "is a save_to_disk folder of an old version, with an index", "save it again")
    entries = _load(path, "state.json", "_data_files")
    written = [entry.get("filename") if isinstance(entry, dict) else entry for entry in entries]
    names = [_plain_name(path, "state.json", name) for name in written]
    parts = [os.path.join(path, name) for name in names]
    if not parts:
        raise _error(path, "is a save_to_disk folder whose state.json names no file", "save or copy it again")
    if len(set(parts)) < len(parts):
        raise _error(os.path.join(path, "state.json"), "names a file twice", _SAVE_AGAIN)
    for part in parts:
        _check_readable(part)
    return DataFile(path, SAVED, None, {part: os.path.getsize(part) for part in parts})


def _load(folder: str, name: str, key: str) -> list[Any]:
    """The list under a key of a JSON file of the folder; empty where there is none."""
    path = os.path.join(folder, name)
    try:
        about = read_json(path)
    except (OSError, ValueError) as error:
        raise _error(path, "is damaged", _SAVE_AGAIN, getattr(error, "strerror", None) or str(error)) from error
    values = (about.get(key) or []) if isinstance(about, dict) else about
    if not (isinstance(about, dict) and isinstance(values, list)):
        raise _error(path, f"is damaged: it has no list {key}", _SAVE_AGAIN, shown(values))
    return values


def _plain_name(folder: str, file: str, name: Any) -> str:
    """A name that a JSON file of the folder gives, if it is one of this folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or os.path.basename(name) != name or "\0" in name:
        what = "names a file outside its folder, or none at all"
        raise _error(os.path.join(folder, file), what, _SAVE_AGAIN, shown(name))
    return name
