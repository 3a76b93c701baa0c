"""Token rows on disk: an Arrow stream that is written as rows come and is memory-mapped afterwards."""

from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from finetune.data.types import Ints

IDS = pa.list_(pa.int32())
ROWS = pa.schema([("input_ids", IDS), ("labels", IDS), ("row", pa.string())])
PAIRS = pa.schema(
    [
        *((name, IDS) for name in ("prompt_ids", "chosen_ids", "chosen_labels", "rejected_ids", "rejected_labels")),
        ("row", pa.string()),
    ]
)
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
        self._tokens += max(len(value) for value in row[:-1])  # type: ignore[arg-type]
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
        self._path = path
        with pa.memory_map(str(path)) as mapped:
            self._batches = [_Batch(batch) for batch in pa.ipc.open_stream(mapped)]
        self._ends = np.cumsum([len(batch.where) for batch in self._batches], dtype=np.int64)

    def __reduce__(self) -> tuple[object, ...]:
        """A process of a data loader maps the file itself."""
        return TokenTable, (self._path,)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, index: int) -> tuple[list[Ints], str]:
        """The token columns of a row, in the schema's order (views into the file), and its `file:line`."""
        position = int(np.searchsorted(self._ends, index, side="right"))
        batch = self._batches[position]
        inside = index - (int(self._ends[position]) - len(batch.where))
        columns = [values[offsets[inside] : offsets[inside + 1]] for offsets, values in batch.columns]
        return columns, batch.where[inside].as_py()

    def lengths(self, column: int) -> Ints:
        """How long a token column is in each row; of the file only where its rows end is read."""
        ends = [np.diff(batch.columns[column][0]) for batch in self._batches]
        return np.concatenate(ends) if ends else np.empty(0, dtype=np.int32)


class _Batch:
    """Views of one record batch: of each token column its offsets and values, and where the rows came from."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        *tokens, self.where = batch.columns
        self.columns: list[tuple[Ints, Ints]] = [(each.offsets.to_numpy(), each.values.to_numpy()) for each in tokens]
