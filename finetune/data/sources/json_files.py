"""JSON files: one object a line, or an array of objects that is never held as a whole."""

from collections.abc import Iterator
from typing import Any

from finetune.data.rows import FileError, RowError
from finetune.data.sources.json_stream import JsonStream
from finetune.data.sources.json_text import WHITE_BYTES, WRITE_JSONL, parse_line
from finetune.data.sources.paths import DataFile
from finetune.data.sources.streams import MAX_ROW_BYTES, ByteStream, Place, opened

Value = dict[str, Any] | RowError


def read_json_lines(file: DataFile, place: Place) -> Iterator[Value]:
    """One object a line; blank lines count but hold no row."""
    do = f"rename it to .json{file.packed or ''}, or {WRITE_JSONL}"
    with opened(file.path, file.packed, place) as stream:
        if _first_byte(stream, place) == b"[":
            raise FileError("a JSON array where one object a line was expected", do)
        first = stream.readline(MAX_ROW_BYTES)
        if _is_indented(first, stream):
            raise FileError("an object over several lines where one object a line was expected", do)
        yield from _lines(first, stream, place)


def read_json(file: DataFile, place: Place) -> Iterator[Value]:
    """An array of objects, or objects one after another, each on one line or on several."""
    with opened(file.path, file.packed, place) as stream:
        if _first_byte(stream, place) == b"[":
            stream.read(1)
            yield from JsonStream(stream, place).array()
            return
        first = stream.readline(MAX_ROW_BYTES)
        if _is_indented(first, stream):
            yield from JsonStream(stream, place, first).objects()
        else:
            yield from _lines(first, stream, place)


def _first_byte(stream: ByteStream, place: Place) -> bytes:
    """The first byte that is not white space, not yet consumed; `place` is at its line."""
    place.number = 1
    while piece := stream.peek():
        content = piece.lstrip(WHITE_BYTES)
        place.number += stream.read(len(piece) - len(content)).count(b"\n")
        if content:
            return content[:1]
    return b""


def _is_indented(first: bytes, stream: ByteStream) -> bool:
    """Whether the object that begins in this line seems to go on in the next one."""
    content = first.strip(WHITE_BYTES)
    following = stream.peek().lstrip(WHITE_BYTES)[:1]
    return content[:1] == b"{" and content[-1:] in b"{[," and following not in b"{"


def _lines(first: bytes, stream: ByteStream, place: Place) -> Iterator[Value]:
    # Bytes, cut at \n only: U+2028 and the like may stand inside a JSON string and end no line.
    line = first
    while line:
        if len(line) == MAX_ROW_BYTES:
            raise FileError(f"a line of more than {MAX_ROW_BYTES >> 20} MiB", WRITE_JSONL)
        content = line.strip(WHITE_BYTES)
        if content:
            yield parse_line(content)
        place.number += 1
        line = stream.readline(MAX_ROW_BYTES)
