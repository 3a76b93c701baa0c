"""JSON files, strictly: one object a line, or an array of objects that is never held as a whole.

`json.loads` keeps the last of two equal keys, reads NaN and accepts half a surrogate pair; each of them would be
trained on, or lost, silently. Here they are errors.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from finetune.data.row_errors import FileError, RowError, RowValue, shown
from finetune.data.sources.bounds import (
    MAX_COLUMNS,
    MAX_LINES,
    MAX_ROW_BYTES,
    first_repeated,
    too_many_values,
)
from finetune.data.sources.data_files import BUFFER, COPY_AGAIN, ByteStream, DataFile, Place, opened
from finetune.data.types import WrittenFloat
from finetune.recipe.row_formats import ROW_FORMATS

WHITE = " \t\r\n"
WHITE_BYTES = WHITE.encode()
WRITE_JSONL = "write one JSON object a line (JSONL), UTF-8"
SAVE_UTF8 = "save the file as UTF-8"

_ESCAPED_SURROGATE = re.compile(r"\\u[dD]")
_BAD_BYTE = re.compile("[\udc80-\udcff]")
"""The characters that `surrogateescape` makes of bytes that are not UTF-8."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = first_repeated([key for key, _ in pairs])
        raise RowError(twice, "the key occurs twice in one object", "keep one of them")
    return row


def _no_constant(name: str) -> NoReturn:
    raise RowError(None, f"{name} is not JSON", "write null, a number, or leave the key out", name)


# One decoder for all rows: json.loads with a hook makes a new one each time, which costs as much as a small row.
DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_float=WrittenFloat, parse_constant=_no_constant)


def parse_line(content: bytes) -> RowValue:
    """The row of one line (no white space around it)."""
    if (error := too_many_values(content)) is not None:
        return error
    try:
        return parse_text(content.decode("utf-8"))
    except UnicodeDecodeError as wrong:
        return not_utf8(content[wrong.start])


def parse_text(text: str) -> RowValue:
    """The row of one JSON text (no white space around it)."""
    try:
        value, end = DECODER.raw_decode(text)
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except RowError as error:
        return error
    except (ValueError, RecursionError) as error:
        return invalid(error, text)
    return checked(value, has_escaped_surrogate(text))


def checked(value: Any, escaped_surrogates: bool) -> RowValue:
    """The value if it is an object without half surrogate pairs; these can only come from \\ud... escapes."""
    if not isinstance(value, dict):
        return RowError(None, "a row must be a JSON object", WRITE_JSONL, shown(value))
    if len(value) > MAX_COLUMNS:
        return RowError(None, f"{len(value):,} keys", f"a row has at most {MAX_COLUMNS:,}: remove the others")
    if escaped_surrogates and (surrogate := _half_surrogate(value)) is not None:
        return RowError(
            surrogate[0] or None, "half of a surrogate pair", "fix the \\u escapes", shown(ascii(surrogate[1]))
        )
    return value


def has_escaped_surrogate(text: str, start: int = 0, end: int | None = None) -> bool:
    """Whether a \\ud... escape occurs in this part of the text."""
    # Most rows have no \\u at all, which is seen in a fifth of the time.
    end = len(text) if end is None else end
    return text.find("\\u", start, end) >= 0 and _ESCAPED_SURROGATE.search(text, start, end) is not None


def invalid(error: Exception, text: str, start: int = 0) -> RowError:
    """The message for text that is not JSON; the error's position minus `start` is that in `text`."""
    if isinstance(error, RecursionError):
        return RowError(None, "objects or lists nested too deep", WRITE_JSONL, shown(text))
    reason = str(error)
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} at character {error.pos - start + 1}"
    return RowError(None, f"not valid JSON ({reason})", WRITE_JSONL, shown(text))


def not_utf8(byte: int) -> RowError:
    """The message for a byte that is not UTF-8."""
    return RowError(None, "not UTF-8", SAVE_UTF8, f"byte 0x{byte:02x}")


def undecoded(text: str, start: int = 0, end: int | None = None) -> RowError | None:
    """The error of text that was decoded with `surrogateescape`; None if there is none."""
    match = _BAD_BYTE.search(text, start, len(text) if end is None else end)
    return None if match is None else not_utf8(ord(match[0]) - 0xDC00)


def _half_surrogate(row: dict[str, Any]) -> tuple[str, str] | None:
    """Place and text of the first string or key that cannot be written as UTF-8."""
    waiting: list[tuple[str, Any]] = [("", row)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, str) and not is_unicode(value):
            return path, value
        if isinstance(value, dict):
            if (broken := next((key for key in value if not is_unicode(key)), None)) is not None:
                return path, broken
            waiting += reversed([(f"{path}.{key}" if path else key, entry) for key, entry in value.items()])
        elif isinstance(value, list):
            waiting += reversed([(f"{path}[{index}]", entry) for index, entry in enumerate(value)])
    return None


def is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


_SPACE = re.compile(f"[{WHITE}]*")
# A string or anything else but a bracket, any number of times; then a bracket, unless the text ends before it.
_TO_BRACKET = re.compile(r'(?:[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+")*+([{}\[\]]?)', re.DOTALL)
_SCALAR = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[^",\s{}\[\]]++', re.DOTALL)
_FIX = "fix the file here: nothing after this place was read"


class JsonStream:
    """JSON text that is read piece by piece; `first` are bytes already taken from the stream."""

    def __init__(self, stream: ByteStream, place: Place, first: bytes = b"") -> None:
        self._stream, self._place = stream, place
        # Bytes that are not UTF-8 become half surrogates, so that their row can be named.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._has_bad_bytes = False
        self._text = self._decoded(first)
        self._position = 0
        self._line = place.number
        self._broken: FileError | None = None

    def array(self) -> Iterator[RowValue]:
        """The rows of an array whose opening bracket was taken, with nothing after it."""
        yield from self.elements()
        if self._next():
            raise FileError("text after the end of the array", _FIX, self._rest())

    def elements(self) -> Iterator[RowValue]:
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
            raise FileError("a comma or ] was expected after the row", _FIX, self._rest())
        self._take(self._position + 1)

    def objects(self) -> Iterator[RowValue]:
        """The rows of objects one after another."""
        while self._next():
            yield self._value()

    def members(self) -> Iterator[str]:
        """The keys of an object whose opening brace was taken; `value` or `elements` takes the value of each."""
        while self._next() == '"':
            while (end := self._end_by_brackets()) is None:
                if not self._more():
                    raise FileError("the object does not end", COPY_AGAIN)
            key = str(json.loads(self._text[self._position : end]))
            self._take(end)
            if self._next() == ":":
                self._take(self._position + 1)
            yield key
            if self._next() != ",":
                break
            self._take(self._position + 1)
        if self._next() != "}":
            raise FileError("a key or } was expected", _FIX, self._rest())
        self._take(self._position + 1)

    def begins_array(self) -> bool:
        """Take the opening bracket of the value that follows, if it is an array."""
        is_array = self._next() == "["
        if is_array:
            self._take(self._position + 1)
        return is_array

    def value(self) -> RowValue:
        """Take the value that follows: the row if it is an object, otherwise an error."""
        self._next()
        return self._value()

    def is_at_end(self) -> bool:
        """Whether nothing follows."""
        return not self._next()

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
            raise FileError(what, f"is a quote or a bracket missing? {_FIX}", self._rest())
        if (error := too_many_values(pieces[0])) is not None:
            raise FileError(error.what, error.do, self._rest())
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

    def _value(self) -> RowValue:
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

    def _read(self) -> tuple[RowValue, int | None]:
        """The row at the position and where it ends: None if it continues after the text read so far."""
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
                raise FileError("a row was expected", _FIX, self._rest())
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


def read_json_lines(file: DataFile, place: Place) -> Iterator[RowValue]:
    """One object a line; blank lines count but hold no row."""
    do = f"rename it to .json{file.packed or ''}, or {WRITE_JSONL}"
    with opened(file.path, file.packed, place) as stream:
        if _first_byte(stream, place) == b"[":
            raise FileError("a JSON array where one object a line was expected", do)
        first = stream.readline(MAX_ROW_BYTES)
        if _is_indented(first, stream):
            raise FileError("an object over several lines where one object a line was expected", do)
        yield from _lines(first, stream, place)


def read_json(file: DataFile, place: Place) -> Iterator[RowValue]:
    """An array of objects, the one array of an object that is not a row itself (`{"data": [...]}`), or objects one
    after another, each on one line or on several."""
    key = _key_of_rows(file)
    with opened(file.path, file.packed, place) as stream:
        if _first_byte(stream, place) == b"[":
            stream.read(1)
            yield from JsonStream(stream, place).array()
            return
        if key is not None:
            yield from _rows_below(key, stream, place)
            return
        first = stream.readline(MAX_ROW_BYTES)
        if _is_indented(first, stream):
            yield from JsonStream(stream, place, first).objects()
        else:
            yield from _lines(first, stream, place)


def _rows_below(key: str, stream: ByteStream, place: Place) -> Iterator[RowValue]:
    """The rows of the array under `key` in the object that the file consists of."""
    stream.read(1)
    json_stream = JsonStream(stream, place)
    for name in json_stream.members():
        if name == key and json_stream.begins_array():
            yield from json_stream.elements()
        else:
            json_stream.value()


FIELDS = frozenset(
    name
    for row_format in ROW_FORMATS.values()
    for field in row_format.fields
    for name in (field, *row_format.aliases.get(field, ()))
)
"""Keys of rows: an object that has one of them is a row."""


def _key_of_rows(file: DataFile) -> str | None:
    """The key under which the one object of a file holds its rows; None for files of other shapes, broken ones too.

    The file is read once more for it, unless it is an array; one that begins with a row only up to that row's end.
    """
    place = Place()
    try:
        with opened(file.path, file.packed, place) as stream:
            if _first_byte(stream, place) != b"{":
                return None
            stream.read(1)
            keys = _keys_of_rows(JsonStream(stream, place))
    except (FileError, ValueError, RecursionError):
        return None
    if len(keys) > 1:
        what = f"the file is one object with several lists of rows: {', '.join(keys)}"
        raise FileError(what, "write each list into a file of its own")
    return keys[0] if keys else None


def _keys_of_rows(stream: JsonStream) -> list[str]:
    """The keys of an object that hold lists of rows; none if the object is a row, or not the only one."""
    keys: list[str] = []
    for key in stream.members():
        if key in FIELDS:
            return []
        if not stream.begins_array():
            stream.value()
            continue
        kinds = {_is_row(element) for element in stream.elements()}
        if True in kinds:
            keys.append(key)
    return keys if stream.is_at_end() else []


def _is_row(element: RowValue) -> bool:
    """Whether an element may be a row: an object, sound or not, that is no message."""
    if isinstance(element, RowError):
        return not element.what.startswith("a row must be")
    return bool(element) and not element.keys() & {"role", "from"}


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


def _lines(first: bytes, stream: ByteStream, place: Place) -> Iterator[RowValue]:
    # Bytes, cut at \n only: U+2028 and the like may occur inside a JSON string and do not end a line.
    line, blank = first, 0
    while line:
        if len(line) == MAX_ROW_BYTES:
            raise FileError(f"a line of more than {MAX_ROW_BYTES >> 20} MiB", WRITE_JSONL)
        content = line.strip(WHITE_BYTES)
        if content:
            yield parse_line(content)
            blank = 0
        elif (blank := blank + 1) > MAX_LINES:
            raise FileError(f"more than {MAX_LINES:,} blank lines", WRITE_JSONL)
        place.number += 1
        line = stream.readline(MAX_ROW_BYTES)
