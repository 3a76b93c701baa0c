"""Data files as bytes: unpacked where they are packed, the place in them kept, what breaks told as `FileError`."""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa

from finetune.data.rows import FileError

BUFFER = 1 << 20
MAX_ROW_BYTES = 1 << 28
"""No row is longer (256 MiB): what looks like one is a file of another kind, or one whose quotes do not match."""

COPY_AGAIN = "copy or download it again"
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
    """What a decompressor gives, as soon as it has it, so that all before a broken place is read."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read

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
            what = "not what .gz or .zst says, or damaged"
            raise FileError(what, f"{COPY_AGAIN}, or name it after what it is", str(error)) from error
        view[: len(piece)] = piece
        return len(piece)


@contextmanager
def opened(path: str, packed: str | None, place: Place) -> Iterator[ByteStream]:
    """The unpacked bytes of a file, after a byte order mark if there is one; `packed` is `.gz`, `.zst` or None.

    `FileError` if the file is of another kind than its name says.
    """
    with _Counted(path) as raw:
        raw.place = place
        stream: ByteStream = io.BufferedReader(raw, BUFFER)
        if packed == ".gz":
            stream = io.BufferedReader(_Unpacked(gzip.GzipFile(fileobj=stream).read1), BUFFER)
        elif packed == ".zst":
            read = pa.CompressedInputStream(stream, "zstd").read
            stream = io.BufferedReader(_Unpacked(lambda size: read(min(size, _ZSTD_PIECE))), BUFFER)
        head = stream.peek(8)[:8]
        for magic, (kind, do) in _MAGIC.items():
            if head.startswith(magic):
                raise FileError(f"this is {kind}, not what its name says", do)
        if head.startswith(_BOM):
            stream.read(len(_BOM))
        yield stream
