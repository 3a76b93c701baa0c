"""Token rows on disk: an Arrow stream that is written as rows come and is memory-mapped afterwards."""

from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from finetune.data.render.rendering import Ints

IDS = pa.list_(pa.int32())
ROWS = pa.schema([("input_ids", IDS), ("labels", IDS), ("row", pa.string())])
PACKED = pa.schema([("input_ids", IDS), ("labels", IDS), ("position_ids", IDS), ("row", pa.list_(pa.string()))])

BATCH_TOKENS = 1 << 18
"""Tokens that are collected before they are written: some MB of memory, and few batches to map."""


class Writer:
    """Writes rows to `path`; `row` is where each came from, as `file:line`. Close it before the file is read."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._stream = pa.ipc.new_stream(path, schema)
        self._columns: list[list[object]] = [[] for _ in schema]
        self._tokens = 0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._stream.close()

    def append(self, *row: object) -> None:
        """Add one row, its columns in the schema's order; token columns are int32 arrays."""
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)
        self._tokens += len(row[0])  # type: ignore[arg-type]
        if self._tokens >= BATCH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if self._columns[0]:
            arrays = [_array(field, column) for field, column in zip(self._schema, self._columns, strict=True)]
            self._stream.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._columns = [[] for _ in self._schema]
        self._tokens = 0


def _array(field: pa.Field, column: list[object]) -> pa.Array:
    if field.type != IDS:
        return pa.array(column, type=field.type)
    offsets = np.cumsum([0, *map(len, column)], dtype=np.int32)  # type: ignore[arg-type]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(column)))  # type: ignore[arg-type]


class TokenTable:
    """The rows of a written file, memory-mapped: nothing is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as mapped:
            self._batches = [_Batch(batch) for batch in pa.ipc.open_stream(mapped)]
        self._ends = np.cumsum([len(batch.where) for batch in self._batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, index: int) -> tuple[Ints, Ints, str]:
        """`input_ids`, `labels` (views into the file) and `file:line` of a row."""
        position = int(np.searchsorted(self._ends, index, side="right"))
        batch = self._batches[position]
        inside = index - (int(self._ends[position]) - len(batch.where))
        start, end = batch.offsets[inside], batch.offsets[inside + 1]
        return batch.input_ids[start:end], batch.labels[start:end], batch.where[inside].as_py()


class _Batch:
    """Views of one record batch: `offsets` of both token columns, their values end to end, and where rows came from."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        ids, labels, self.where = (batch.column(name) for name in ROWS.names)
        self.offsets: Ints = ids.offsets.to_numpy()
        self.input_ids: Ints = ids.values.to_numpy()
        self.labels: Ints = labels.values.to_numpy()
