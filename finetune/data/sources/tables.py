"""Parquet and Arrow files: rows as plain Python, a few at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    # With a buffer size columns are read as they are needed; without one each row group is held as a whole.
    with _damage_named("Parquet", file.path), pq.ParquetFile(file.path, buffer_size=1 << 20) as parquet:
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
    decoders = {field.name: decode for field in table.schema if (decode := _decoder(field.type)) is not None}
    step = _rows_a_piece(table.nbytes, table.num_rows)
    for start in range(0, table.num_rows, step):
        for row in _to_python(table.slice(start, step)):
            yield _decoded(row, decoders) if decoders and isinstance(row, dict) else row


def _to_python(table: pa.RecordBatch | pa.Table) -> list[Value]:
    try:
        rows: list[Value] = table.to_pylist(maps_as_pydicts="strict")
    except (ValueError, KeyError, ArithmeticError, pa.ArrowException) as error:
        if table.num_rows > 1:
            return [row for index in range(table.num_rows) for row in _to_python(table.slice(index, 1))]
        return [RowError(None, "a value that cannot be read", "mend or remove the row", str(error))]
    return rows


Decode = Callable[[Any], Any]


def _decoded(row: dict[str, Any], decoders: dict[str, Decode]) -> Value:
    try:
        return {name: decoders[name](value) if name in decoders else value for name, value in row.items()}
    except (ValueError, RecursionError) as error:
        return RowError(None, f"a JSON column does not hold JSON ({error})", "mend or remove the row")
    except RowError as error:
        return error


def _decoder(kind: pa.DataType) -> Decode | None:
    """How a value of this type is made what `datasets` would show: its Json columns are stored as text."""
    if isinstance(kind, pa.JsonType):
        return lambda value: None if value is None else DECODER.decode(value)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _decoder(kind.value_type)
        return inner and (lambda value: value and [inner(entry) for entry in value])
    if pa.types.is_struct(kind):
        inside = {field.name: decode for field in kind if (decode := _decoder(field.type)) is not None}
        return (lambda value: value and _decoded_struct(value, inside)) if inside else None
    return None


def _decoded_struct(value: dict[str, Any], decoders: dict[str, Decode]) -> dict[str, Any]:
    return {name: decoders[name](entry) if name in decoders else entry for name, entry in value.items()}
