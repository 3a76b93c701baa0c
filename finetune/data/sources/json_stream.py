"""Objects cut out of a stream of JSON text, one by one, with the line at which each begins.

Python's own decoder reads them; where it fails, the brackets tell whether the object is broken or only not yet read
as a whole. So a broken object is one bad row, and those after it are read.
"""

import codecs
import re
from collections.abc import Iterator
from typing import Any

from finetune.data.rows import FileError, RowError, shown
from finetune.data.sources.json_text import (
    DECODER,
    WHITE,
    checked,
    has_escaped_surrogate,
    invalid,
    is_unicode,
    undecoded,
)
from finetune.data.sources.streams import BUFFER, COPY_AGAIN, MAX_ROW_BYTES, ByteStream, Place

_SPACE = re.compile(f"[{WHITE}]*")
# A string or anything else but a bracket, any number of times; then a bracket, unless the text ends before it.
_TO_BRACKET = re.compile(r'(?:[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+")*+([{}\[\]]?)', re.DOTALL)
_SCALAR = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[^",\s{}\[\]]++', re.DOTALL)
_MEND = "mend the file here: nothing after this place was read"


class JsonStream:
    """JSON text that is read piece by piece; `first` are bytes already taken from the stream."""

    def __init__(self, stream: ByteStream, place: Place, first: bytes = b"") -> None:
        self._stream, self._place = stream, place
        # Bytes that are not UTF-8 become half surrogates, so that the row they stand in can be named.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._has_bad_bytes = False
        self._text = self._decoded(first)
        self._position = 0
        self._line = place.number
        self._broken: FileError | None = None

    def array(self) -> Iterator[dict[str, Any] | RowError]:
        """The rows of an array whose opening bracket was taken."""
        if (following := self._next()) != "]":
            while True:
                yield self._value()
                if (following := self._next()) != ",":
                    break
                self._take(self._position + 1)
                self._next()
        if following == "":
            raise FileError("the array does not end", COPY_AGAIN)
        if following != "]":
            raise FileError("a comma or ] was expected after the row", _MEND, self._rest())
        self._take(self._position + 1)
        if self._next():
            raise FileError("text after the end of the array", _MEND, self._rest())

    def objects(self) -> Iterator[dict[str, Any] | RowError]:
        """The rows of objects that stand one after another."""
        while self._next():
            yield self._value()

    def _next(self) -> str:
        """The next character that is not white space, not taken; "" at the end. The place is its line."""
        while True:
            match = _SPACE.match(self._text, self._position)
            assert match is not None
            self._take(match.end())
            if self._position < len(self._text) or not self._more():
                self._place.number = self._line
                return self._text[self._position : self._position + 1]

    def _rest(self) -> str:
        return shown(self._text[self._position : self._position + 100])

    def _take(self, end: int) -> None:
        self._line += self._text.count("\n", self._position, end)
        self._position = end

    def _more(self) -> bool:
        """Read on, as much again as is not yet taken: an object of any length is looked at a few times only."""
        if self._broken is not None:
            raise self._broken
        pieces = [self._text[self._position :]]
        if len(pieces[0]) > MAX_ROW_BYTES:
            what = f"the row that begins here has more than {MAX_ROW_BYTES >> 20} MiB"
            raise FileError(what, f"is a quote or a bracket missing? {_MEND}", self._rest())
        wanted = max(BUFFER, len(pieces[0]))
        try:
            while wanted > 0 and (piece := self._stream.read1(BUFFER)):
                pieces.append(self._decoded(piece))
                wanted -= len(piece)
            if wanted > 0:
                pieces.append(self._decoded(b"", final=True))
        except FileError as error:
            self._broken = error  # raised after the rows before it
        self._text, self._position = "".join(pieces), 0
        return len(self._text) > len(pieces[0])

    def _decoded(self, piece: bytes, final: bool = False) -> str:
        text = self._decoder.decode(piece, final)
        self._has_bad_bytes |= not text.isascii() and not is_unicode(text)
        return text

    def _value(self) -> dict[str, Any] | RowError:
        """Take the row that begins at the position."""
        while True:
            row, end = self._read()
            if end is not None:
                self._take(end)
                return row
            if not self._more():
                if self._position == len(self._text):
                    raise FileError("the array does not end", COPY_AGAIN)
                do = f"{COPY_AGAIN} if it was cut; otherwise a quote or a bracket is missing"
                raise FileError("the row that begins here does not end", do, self._rest())

    def _read(self) -> tuple[dict[str, Any] | RowError, int | None]:
        """The row at the position and where it ends: None if it goes on after what was read so far."""
        text, start = self._text, self._position
        try:
            value, end = DECODER.raw_decode(text, start)
        except (ValueError, RowError, RecursionError) as error:
            after = self._end_by_brackets()
            bad_byte = self._has_bad_bytes and undecoded(text, start, after)
            row = error if isinstance(error, RowError) else invalid(error, text[start:after], start)
            return bad_byte or row, after
        if not isinstance(value, dict):
            after = self._end_by_brackets()  # the decoder is content with 1 where 10 or 1.5 was only read in part
            if after is None:
                return {}, None
            end = after
        bad_byte = self._has_bad_bytes and undecoded(text, start, end)
        return bad_byte or checked(value, has_escaped_surrogate(text, start, end)), end

    def _end_by_brackets(self) -> int | None:
        text, position, depth = self._text, self._position, 0
        if text[position : position + 1] not in ("{", "[", ""):
            match = _SCALAR.match(text, position)
            if match is None:
                raise FileError("a row was expected", _MEND, self._rest())
            return match.end() if match.end() < len(text) else None
        while True:
            match = _TO_BRACKET.match(text, position)
            assert match is not None
            if not match[1]:
                return None
            position = match.end()
            depth += 1 if match[1] in "{[" else -1
            if depth == 0:
                return position
