"""Check the header of a GGUF file before gguf's reader sees it, which believes every length and count in it.

An array of 2^60 entries would keep that reader busy for ever. Here every length must lie inside the file, and the
whole header within bounds that no published file comes near.
"""

import os
import struct
from math import prod
from pathlib import Path
from typing import IO

from finetune.errors import Problem, WeightsError
from finetune.files import open_regular

MAX_KEYS, MAX_TENSORS, MAX_ENTRIES = 2**12, 2**16, 2**21
"""Keys, tensors, and entries of all lists together; 260,000 tokens with scores, types and merges are 1,300,000."""
MAX_TEXT = 2**24
"""Bytes of one text; the longest are chat templates."""

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY = 8, 9
_MAX_NAME, _MAX_AXES = 2**16, 4
_ALIGNMENTS = tuple(2**power for power in range(3, 21))
_FETCH_AGAIN = "fetch the file again"


class _BadHeaderError(ValueError):
    """What is wrong with the header."""


def check_header(file: Path) -> None:
    """Raise WeightsError for a file whose header is not one of a GGUF file of this byte order, versions 2 and 3."""
    try:
        with open_regular(file) as stream:
            _Header(stream).check()
    except (_BadHeaderError, struct.error, UnicodeDecodeError) as error:
        what = "is not a readable GGUF file"
        raise WeightsError(Problem(str(file), what, _FETCH_AGAIN, str(error))) from error


class _Header:
    def __init__(self, stream: IO[bytes]) -> None:
        self.size = os.fstat(stream.fileno()).st_size
        self._stream, self._entries, self._alignment = stream, 0, 32
        self._buffer, self._next = b"", 0

    def check(self) -> None:
        magic, (version, tensors, keys) = self._bytes(4), self._read("<IQQ")
        if magic != b"GGUF" or (version not in (2, 3) and version & 0xFFFF):
            raise _BadHeaderError(f"version {version}, where 2 and 3 are known")
        if version & 0xFFFF == 0:
            return  # of the other byte order, which is refused with what to do
        if tensors > MAX_TENSORS or keys > MAX_KEYS:
            raise _BadHeaderError(f"{tensors} tensors and {keys} keys")
        for _ in range(keys):
            self._key()
        ends = [self._tensor() for _ in range(tensors)]
        start = -(-self._position // self._alignment) * self._alignment
        if start + max(ends, default=0) > self.size:
            raise _BadHeaderError(f"{self.size} bytes, where {start + max(ends)} are needed")

    @property
    def _position(self) -> int:
        return self._stream.tell() - len(self._buffer) + self._next

    def _bytes(self, count: int) -> bytes:
        """The next bytes; never more are asked for than the file has."""
        if count > self.size - self._position:
            raise _BadHeaderError(f"{count} bytes at {self._position}, beyond the end of the file")
        if self._next + count > len(self._buffer):
            kept = self._buffer[self._next :]
            self._buffer, self._next = kept + self._stream.read(max(count, 2**20)), 0
        self._next += count
        return self._buffer[self._next - count : self._next]

    def _read(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self._bytes(struct.calcsize(layout)))

    def _text(self, most: int) -> bytes:
        (length,) = self._read("<Q")
        if length > most:
            raise _BadHeaderError(f"a text of {length} bytes at {self._position}")
        return self._bytes(length)

    def _key(self) -> None:
        name = self._text(_MAX_NAME).decode("utf-8")
        (kind,) = self._read("<I")
        if name == "general.alignment":
            (self._alignment,) = self._read("<I") if kind == 4 else (0,)
            if self._alignment not in _ALIGNMENTS:
                raise _BadHeaderError(f"an alignment of {self._alignment}")
        else:
            self._value(name, kind)

    def _value(self, name: str, kind: int, nested: bool = False) -> None:
        if kind in _SIZES:
            self._bytes(_SIZES[kind])
        elif kind == _TEXT:
            self._text(MAX_TEXT).decode("utf-8")
        elif kind == _ARRAY and not nested:
            self._list(name)
        else:
            raise _BadHeaderError(f"{name[:80]!r} of the unknown type {kind}")

    def _list(self, name: str) -> None:
        kind, count = self._read("<IQ")
        self._entries += count
        if self._entries > MAX_ENTRIES:
            raise _BadHeaderError(f"{count} entries in {name[:80]!r}")
        if kind in _SIZES:
            self._bytes(count * _SIZES[kind])
        else:
            for _ in range(count):
                self._value(name, kind, nested=True)

    def _tensor(self) -> int:
        """Where the tensor ends, from where all of them begin."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._text(_MAX_NAME).decode("utf-8")
        (axes,) = self._read("<I")
        if not 1 <= axes <= _MAX_AXES:
            raise _BadHeaderError(f"{name[:80]!r} with {axes} axes")
        shape = self._read(f"<{axes}Q")
        kind, offset = self._read("<IQ")
        try:
            block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise _BadHeaderError(f"{name[:80]!r} of the unknown type {kind}") from None
        if 0 in shape or shape[0] % block:
            raise _BadHeaderError(f"{name[:80]!r} of shape {list(shape)}")
        return int(offset + prod(shape) // block * nbytes)
