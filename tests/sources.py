"""Rows written to files, and what a source makes of them."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from finetune.data.row_errors import Row, RowError
from finetune.data.sources import open_source
from finetune.recipe import DataSource

ROWS: list[dict[str, Any]] = [
    {"prompt": "a\u2028b", "n": 1, "turns": [{"role": "user", "content": None}]},
    {"prompt": 'say "{[" \\', "n": 2, "turns": []},
    {"prompt": "😀\x00\r\n", "n": 3, "turns": [{"role": "tool", "content": "x"}] * 2},
]


def pack(content: bytes, packed: str) -> bytes:
    """Compress as .gz or .zst, or leave it."""
    if packed == ".gz":
        return gzip.compress(content)
    return bytes(pa.compress(content, codec="zstd", asbytes=True)) if packed == ".zst" else content


def json_lines(rows: Sequence[Any]) -> bytes:
    """One object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(path: Path, content: bytes) -> Path:
    """A file with this content, in a folder made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_table(path: Path, rows: list[dict[str, Any]], rows_a_group: int = 1000) -> Path:
    """A Parquet file, or an Arrow file as `datasets` writes it (stream format)."""
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows_a_group)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows_a_group)
    return path


def read(path: Path | str) -> list[Row]:
    """All rows of a path of the recipe."""
    return list(open_source(DataSource(path=str(path), format="auto")))


def values(path: Path | str) -> list[Any]:
    """The rows themselves; a bad one as what it is."""
    return [row.value for row in read(path)]


def messages(path: Path | str) -> list[str]:
    """What a user would read about the bad rows, with the file's name only."""
    bad = [(row, row.value) for row in read(path) if isinstance(row.value, RowError)]
    return [str(error.problem(Path(row.path).name, row.number)) for row, error in bad]
