"""A file four times as long takes no more memory to read."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.data.sources import open_files
from tests.sources import json_lines, pack, write

ROWS = 1_500  # of 4 KB each


def rows(count: int) -> list[dict[str, Any]]:
    """Rows that do not compress to nothing, nested as conversations are."""
    text = "".join(chr(32 + n * n * 7919 % 90) for n in range(8000))
    return [{"n": n, "turns": [{"role": "user", "content": text[n % 4000 :][:4000]}]} for n in range(count)]


def to_csv(count: int) -> bytes:
    return b"n,text\n" + b"".join(b'%d,"%s"\n' % (n, b"x y z, " * 600) for n in range(count))


CONTENT: dict[str, Callable[[int], bytes]] = {
    "r.jsonl": lambda count: json_lines(rows(count)),
    "r.jsonl.gz": lambda count: pack(json_lines(rows(count)), ".gz"),
    "r.jsonl.zst": lambda count: pack(json_lines(rows(count)), ".zst"),
    "r.json": lambda count: json.dumps(rows(count)).encode(),
    "in_an_object.json": lambda count: json.dumps({"data": rows(count)}).encode(),
    "r.csv": to_csv,
}


@pytest.mark.parametrize("name", CONTENT)
def test_text(tmp_path: Path, name: str) -> None:
    peaks = []
    for times in (1, 4):
        path = str(write(tmp_path / str(times) / name, CONTENT[name](ROWS * times)))
        tracemalloc.start()
        assert sum(isinstance(row.value, dict) for row in open_files(path)) == ROWS * times
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.1
    assert peaks[1] < 12 << 20  # bytes; the longer file has 24 MB


def test_a_parquet_file_of_one_row_group(tmp_path: Path) -> None:
    peaks = []
    for times in (1, 4):
        table = pa.Table.from_pylist(rows(ROWS * times))
        pq.write_table(table, tmp_path / "r.parquet", row_group_size=ROWS * times, use_dictionary=False)
        del table
        before = pa.total_allocated_bytes()
        peaks.append(max(pa.total_allocated_bytes() - before for _ in open_files(str(tmp_path / "r.parquet"))))
    assert peaks[1] < peaks[0] * 1.1
