"""Parquet, Arrow and CSV files: rows as plain Python, a few at a time."""

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from finetune.data.row_errors import FileError, RowError, RowValue, shown
from finetune.data.sources.bounds import (
    MAX_COLUMNS,
    MAX_LINES,
    MAX_ROW_BYTES,
    MAX_VALUES,
    Expansion,
    check_columns,
    first_repeated,
    too_many_values,
)
from finetune.data.sources.data_files import COPY_AGAIN, ByteStream, DataFile, Place, opened
from finetune.data.sources.json_files import DECODER, SAVE_UTF8, not_utf8
from finetune.data.sources.table_checks import check_batch
from finetune.files import check_regular

_PIECE = 1 << 24
"""Bytes of a table that are turned into Python objects at a time; at least one row, at most 1000."""
_LARGE_PIECE = 4 * _PIECE


def read_parquet(file: DataFile, place: Place) -> Iterator[RowValue]:
    """The rows of a Parquet file, through row groups of any size."""
    # Columns are read as they are needed: by default each row group is fetched as a whole, and may be all of the file.
    streamed = {"pre_buffer": False, "buffer_size": 1 << 20}
    check_regular(file.path)
    with _damage_named("Parquet", file.path), pq.ParquetFile(file.path, **streamed) as parquet:
        about = parquet.metadata
        nbytes = sum(about.row_group(index).total_byte_size for index in range(about.num_row_groups))
        batches = parquet.iter_batches(batch_size=_rows_a_piece(nbytes, about.num_rows))
        for batch in _checked(batches, Expansion(file.size)):
            for value in rows_of(batch):
                place.number += 1
                place.done = min(file.size, file.size * place.number // max(1, about.num_rows))
                yield value


def read_arrow(file: DataFile, place: Place) -> Iterator[RowValue]:
    """The rows of an .arrow file (stream or file format), or of all those of a `save_to_disk` folder."""
    before = 0
    for part, size in file.parts.items():
        check_regular(part)
        with _damage_named("Arrow", part), pa.memory_map(part) as mapped:
            ends: list[int] = []
            for batch in _checked(_batches(mapped, ends), Expansion(size)):
                place.done = before + ends[-1]
                for value in rows_of(batch):
                    place.number += 1
                    yield value
        before += size


@contextmanager
def _damage_named(kind: str, path: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, ArithmeticError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise FileError(f"not a {kind} file, or damaged", COPY_AGAIN, reason.replace(path, "the file")) from error


def _batches(mapped: pa.MemoryMappedFile, ends: list[int]) -> Iterator[pa.RecordBatch]:
    """Batches; the bytes up to the end of each are appended to `ends`."""
    is_stream = mapped.read(6) != b"ARROW1"
    mapped.seek(0)
    if is_stream:
        for batch in pa.ipc.open_stream(mapped):
            ends.append(mapped.tell())
            yield batch
        return
    file = pa.ipc.open_file(mapped)
    for index in range(file.num_record_batches):
        ends.append(mapped.size() * (index + 1) // file.num_record_batches)
        yield file.get_batch(index)


def _checked(batches: Iterable[pa.RecordBatch], expansion: Expansion) -> Iterator[pa.RecordBatch]:
    """Batches that point to nothing outside of the file, and are not far more than it holds."""
    for batch in batches:
        check_columns(batch.schema.names)
        check_batch(batch)
        expansion.add(batch.nbytes, batch.num_rows)
        yield batch


def _rows_a_piece(nbytes: int, rows: int) -> int:
    return max(1, min(1000, _PIECE * rows // max(1, nbytes)))


def rows_of(table: pa.RecordBatch | pa.Table) -> Iterator[RowValue]:
    """Each row as a dict: structs and maps are dicts, missing fields of structs None, JSON columns decoded."""
    check_columns(table.schema.names)
    for batch in [table] if isinstance(table, pa.RecordBatch) else table.to_batches():
        step = _rows_a_piece(batch.nbytes, batch.num_rows)
        for start in range(0, batch.num_rows, step):
            yield from _rows_of_piece(batch.slice(start, step))


def _rows_of_piece(piece: pa.RecordBatch) -> Iterator[RowValue]:
    """The rows of a piece, in halves where a few of them hold most of its bytes."""
    if piece.nbytes > _LARGE_PIECE and piece.num_rows > 1:
        half = piece.num_rows // 2
        yield from _rows_of_piece(piece.slice(0, half))
        yield from _rows_of_piece(piece.slice(half))
    elif piece.nbytes > MAX_ROW_BYTES:
        what = f"{piece.nbytes:,} bytes in one row"
        yield RowError(None, what, f"a row may have {MAX_ROW_BYTES >> 20} MiB: shorten or remove it")
    else:
        yield from _to_python(piece)


def _to_python(batch: pa.RecordBatch) -> list[RowValue]:
    try:
        columns = [_column(column) for column in batch.columns]
    except (ValueError, KeyError, ArithmeticError, RecursionError, RowError, pa.ArrowException) as error:
        if batch.num_rows > 1:
            return [row for index in range(batch.num_rows) for row in _to_python(batch.slice(index, 1))]
        if isinstance(error, RowError):
            return [error]
        return [RowError(None, "a value that cannot be read", "fix or remove the row", str(error))]
    names = batch.schema.names
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _column(array: pa.Array) -> list[Any]:
    """The values of a column as Python objects; lists of structs in a quarter of the time of pyarrow's `to_pylist`,
    and columns that `datasets` stores as JSON text decoded."""
    kind = array.type
    if isinstance(kind, pa.JsonType):
        return [None if text is None else _decoded(text) for text in array.storage.to_pylist()]
    if pa.types.is_dictionary(kind):
        values = _column(array.dictionary)  # once, however often it is pointed to
        return [None if index is None else values[index] for index in array.indices.to_pylist()]
    if pa.types.is_struct(kind) and len({field.name for field in kind}) == kind.num_fields > 0:
        names = [field.name for field in kind]
        fields = [_column(field) for field in array.flatten()]
        return _with_nulls(array, [dict(zip(names, row, strict=True)) for row in zip(*fields, strict=True)])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        offsets = array.offsets.to_pylist()
        values = _column(array.values.slice(offsets[0], offsets[-1] - offsets[0]))
        borders = [offset - offsets[0] for offset in offsets]
        return _with_nulls(array, [values[start:end] for start, end in pairwise(borders)])
    values = array.to_pylist(maps_as_pydicts="strict")
    return list(values)


def _decoded(text: str) -> Any:
    if (error := too_many_values(text)) is not None:
        raise error
    return DECODER.decode(text)


def _with_nulls(array: pa.Array, values: list[Any]) -> list[Any]:
    if not array.null_count:
        return values
    return [value if valid else None for value, valid in zip(values, array.is_valid().to_pylist(), strict=True)]


_QUOTING = 'put it in quotes and double those inside ("")'


def read_csv(file: DataFile, place: Place) -> Iterator[RowValue]:
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
    if len(record) > MAX_COLUMNS:
        raise FileError(f"{len(record):,} columns", f"a file of rows has at most {MAX_COLUMNS:,}: remove the others")
    if "" in record:
        do = "the first line must name every column (pandas writes the row numbers without a name unless index=False)"
        raise FileError(f"column {record.index('') + 1} has no name", do, shown(record))
    if len(set(record)) < len(record):
        do = "the first line must name each column once"
        raise FileError(f"two columns are named {shown(first_repeated(record))}", do, shown(record))
    if len(record) == 1:
        for character, do in ((";", "write commas"), ("\t", "name it .tsv"), (",", "name it .csv")):
            if character in record[0]:
                what = f"the header has one column, with {shown(character)} in its name"
                raise FileError(what, f"{kind} wants another separator: {do}", shown(record))
    return record


class _Lines:
    """Decoded lines; the error of one is kept in `error` until its record can be named."""

    def __init__(self, stream: ByteStream, separator: str) -> None:
        self._stream, self._separator = stream, separator.encode()
        self.error: RowError | None
        self.start_record()

    def start_record(self) -> None:
        """Forget what belongs to the record before."""
        self.error = None
        self._left, self._separators, self._lines = MAX_ROW_BYTES, 0, 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._stream.readline(self._left)
        if not line:
            raise StopIteration
        self._left -= len(line)
        self._lines += 1
        # Counted in large records only.
        self._separators += line.count(self._separator) if MAX_ROW_BYTES - self._left > MAX_VALUES else 0
        if self._separators > MAX_VALUES:
            raise FileError(f"more than {MAX_VALUES:,} fields in a record", "write one record a line")
        if len(line) == MAX_ROW_BYTES:
            # The csv module would take the rest of it for another record.
            raise FileError(f"a line of more than {MAX_ROW_BYTES >> 20} MiB", "write one record a line")
        if not self._left or self._lines > MAX_LINES:
            raise _broken("field limit")
        if b"\0" in line:
            self.error = RowError(None, "a NUL byte: binary data, or UTF-16", SAVE_UTF8)
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            self.error = not_utf8(line[error.start])
            return line.decode("utf-8", "replace")


def _records(stream: ByteStream, delimiter: str, place: Place) -> Iterator[list[str] | RowError]:
    lines = _Lines(stream, delimiter)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    blank = 0
    while True:
        place.number = reader.line_num + 1
        lines.start_record()
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
            blank = 0
        elif (blank := blank + 1) > MAX_LINES:
            raise FileError(f"more than {MAX_LINES:,} blank lines", "write one record a line")


def _broken(reason: str) -> RowError:
    """An error of the csv module with a remedy. After a quote without an end nothing is left to read."""
    if reason == "unexpected end of data" or "field limit" in reason:
        return FileError("a quote that begins in this record has no end", _QUOTING.replace("it", "the field", 1))
    if "new-line character" in reason:
        return RowError(None, "a carriage return without a line feed", "end lines with LF or CR LF, or quote the field")
    return RowError(None, f"a quote inside a field ({reason})", _QUOTING.replace("it", "the field", 1))
