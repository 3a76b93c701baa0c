"""CSV and TSV files: a header, then one record a row; all values are strings."""

import csv
from collections.abc import Iterator
from typing import Any

from finetune.data.rows import FileError, RowError, shown
from finetune.data.sources.json_text import SAVE_UTF8, not_utf8
from finetune.data.sources.paths import DataFile
from finetune.data.sources.streams import MAX_ROW_BYTES, ByteStream, Place, opened

_QUOTING = 'put it in quotes and double those inside ("")'


def read_csv(file: DataFile, place: Place) -> Iterator[dict[str, Any] | RowError]:
    """Records as `{column of the header: string}`; blank lines count but hold no row."""
    csv.field_size_limit(MAX_ROW_BYTES)  # the module's own limit, 128 KiB, is one for the whole process
    columns: list[str] | None = None
    with opened(file.path, file.packed, place) as stream:
        for record in _records(stream, "\t" if file.kind == ".tsv" else ",", place):
            if columns is None:
                columns = _header(record, file.kind)
            elif isinstance(record, RowError):
                yield record
            elif len(record) != len(columns):
                what = f"{len(record)} fields where the header has {len(columns)}"
                do = f"if a field has a separator or a line break in it, {_QUOTING}"
                yield RowError(None, what, do, shown(record))
            else:
                yield dict(zip(columns, record, strict=True))


def _header(record: list[str] | RowError, kind: str) -> list[str]:
    if isinstance(record, RowError):
        raise FileError(record.what, record.do, record.got)
    if "" in record:
        do = "the first line must name every column (pandas writes the row numbers without a name unless index=False)"
        raise FileError(f"column {record.index('') + 1} has no name", do, shown(record))
    if len(set(record)) < len(record):
        twice = next(name for name in record if record.count(name) > 1)
        do = "the first line must name each column once"
        raise FileError(f"two columns are named {shown(twice)}", do, shown(record))
    if len(record) == 1:
        for character, do in ((";", "write commas"), ("\t", "name it .tsv"), (",", "name it .csv")):
            if character in record[0]:
                what = f"the header has one column, with {shown(character)} in its name"
                raise FileError(what, f"{kind} wants another separator: {do}", shown(record))
    return record


class _Lines:
    """Decoded lines; what is wrong with one waits in `error`, so that the record it belongs to can be named."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self.error: RowError | None = None

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._stream.readline(MAX_ROW_BYTES)
        if not line:
            raise StopIteration
        if len(line) == MAX_ROW_BYTES:
            # The csv module would take the rest of it for another record.
            raise FileError(f"a line of more than {MAX_ROW_BYTES >> 20} MiB", "write one record a line")
        if b"\0" in line:
            self.error = RowError(None, "a NUL byte: binary data, or UTF-16", SAVE_UTF8)
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            self.error = not_utf8(line[error.start])
            return line.decode("utf-8", "replace")


def _records(stream: ByteStream, delimiter: str, place: Place) -> Iterator[list[str] | RowError]:
    lines = _Lines(stream)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        place.number = reader.line_num + 1
        lines.error = None
        record: list[str] | RowError
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            record = _broken(str(error))
            if isinstance(record, FileError):
                raise record from error
        if record:
            yield lines.error or record


def _broken(reason: str) -> RowError:
    """What the csv module says, in words that help. After a quote without an end nothing is left to read."""
    if reason == "unexpected end of data" or "field limit" in reason:
        return FileError("a quote that begins in this record has no end", _QUOTING.replace("it", "the field", 1))
    if "new-line character" in reason:
        return RowError(None, "a carriage return without a line feed", "end lines with LF or CR LF, or quote the field")
    return RowError(None, f"a quote inside a field ({reason})", _QUOTING.replace("it", "the field", 1))
