"""Parquet and Arrow files: rows as plain Python, a few at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from finetune.data.rows import FileError, RowError, shown
from finetune.data.sources.json_text import DECODER
from finetune.data.sources.paths import DataFile
from finetune.data.sources.streams import COPY_AGAIN, Place

Value = dict[str, Any] | RowError
_PIECE = 1 << 24
"""Bytes of a table that are turned into Python objects at a time; at least one row, at most 1000."""


def read_parquet(file: DataFile, place: Place) -> Iterator[Value]:
    """The rows of a Parquet file, through row groups of any size."""
    # Columns are read as they are needed: by default each row group is fetched as a whole, and may be all of the file.
    streamed = {"pre_buffer": False, "buffer_size": 1 << 20}
    with _damage_named("Parquet", file.path), pq.ParquetFile(file.path, **streamed) as parquet:
        about = parquet.metadata
        nbytes = sum(about.row_group(index).total_byte_size for index in range(about.num_row_groups))
        for batch in parquet.iter_batches(batch_size=_rows_a_piece(nbytes, about.num_rows)):
            for value in rows_of(batch):
                place.number += 1
                place.done = file.size * place.number // about.num_rows
                yield value


def read_arrow(file: DataFile, place: Place) -> Iterator[Value]:
    """The rows of an .arrow file (stream or file format), or of all those of a `save_to_disk` folder."""
    before = 0
    for part, size in file.parts.items():
        with _damage_named("Arrow", part), pa.memory_map(part) as mapped:
            for batch, done in _batches(mapped):
                place.done = before + done
                for value in rows_of(batch):
                    place.number += 1
                    yield value
        before += size


@contextmanager
def _damage_named(kind: str, path: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise FileError(f"not a {kind} file, or damaged", COPY_AGAIN, reason.replace(path, "the file")) from error


def _batches(mapped: pa.MemoryMappedFile) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Batches, and the bytes up to their end."""
    is_stream = mapped.read(6) != b"ARROW1"
    mapped.seek(0)
    if is_stream:
        for batch in pa.ipc.open_stream(mapped):
            yield batch, mapped.tell()
        return
    file = pa.ipc.open_file(mapped)
    for index in range(file.num_record_batches):
        yield file.get_batch(index), mapped.size() * (index + 1) // file.num_record_batches


def _rows_a_piece(nbytes: int, rows: int) -> int:
    return max(1, min(1000, _PIECE * rows // max(1, nbytes)))


def rows_of(table: pa.RecordBatch | pa.Table) -> Iterator[Value]:
    """Each row as a dict: structs and maps are dicts, missing fields of structs None, JSON columns what they hold."""
    names = table.schema.names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise FileError(f"two columns are named {shown(twice)}", "name each column once")
    for batch in [table] if isinstance(table, pa.RecordBatch) else table.to_batches():
        step = _rows_a_piece(batch.nbytes, batch.num_rows)
        for start in range(0, batch.num_rows, step):
            yield from _to_python(batch.slice(start, step))


def _to_python(batch: pa.RecordBatch) -> list[Value]:
    try:
        columns = [_column(column) for column in batch.columns]
    except (ValueError, KeyError, ArithmeticError, RecursionError, RowError, pa.ArrowException) as error:
        if batch.num_rows > 1:
            return [row for index in range(batch.num_rows) for row in _to_python(batch.slice(index, 1))]
        if isinstance(error, RowError):
            return [error]
        return [RowError(None, "a value that cannot be read", "mend or remove the row", str(error))]
    names = batch.schema.names
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _column(array: pa.Array) -> list[Any]:
    """The values of a column as Python objects; lists of structs in a quarter of the time of pyarrow's `to_pylist`,
    and columns that `datasets` stores as JSON text as what the text says."""
    kind = array.type
    if isinstance(kind, pa.JsonType):
        return [None if text is None else DECODER.decode(text) for text in array.storage.to_pylist()]
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


def _with_nulls(array: pa.Array, values: list[Any]) -> list[Any]:
    if not array.null_count:
        return values
    return [value if valid else None for value, valid in zip(values, array.is_valid().to_pylist(), strict=True)]
