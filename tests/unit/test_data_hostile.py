"""Files of rows made to bring a reader down: each is refused by its name, within 20 s of CPU time and 1 GiB."""

import gzip
import os
import struct
from pathlib import Path

import pyarrow as pa
import pytest

from finetune.data.row_errors import RowError
from finetune.data.row_size import characters_of, check_characters
from finetune.data.types import Conversation, Document, Preference
from tests.hostile_rows import Outcome, damaged_files, outcomes
from tests.sources import write

DAMAGED = 60


def table_file(path: Path, table: pa.Table, old: bytes = b"", new: bytes = b"") -> None:
    """An Arrow file in which some bytes of its columns are others."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    content = path.read_bytes()
    assert content.count(old) >= 1
    path.write_bytes(content.replace(old, new, 1))


def packed(content: bytes, times: int, suffix: str) -> bytes:
    """`content` so many times, packed piece by piece."""
    if suffix == ".gz":
        return gzip.compress(content * times, compresslevel=1)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        for _ in range(times):
            stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


def write_tables(folder: Path) -> None:
    text = pa.table({"prompt": ["aaaa", "bbbb"], "completion": ["cccc", "dddd"]})
    offsets = struct.pack("<iii", 0, 4, 8)
    table_file(folder / "before.arrow", text, offsets, struct.pack("<iii", -50_000_000, -4, 8))
    table_file(folder / "behind.arrow", text, offsets, struct.pack("<iii", 0, 2**30, 2**31 - 16))
    saved = folder / "saved"
    saved.mkdir()
    table_file(saved / "a.arrow", text, offsets, struct.pack("<iii", 0, 2**30, 2**31 - 16))
    write(saved / "state.json", b'{"_data_files": [{"filename": "a.arrow"}]}')
    words = pa.table({"text": pa.array(["a", "b", "a", "b"]).dictionary_encode()})
    table_file(folder / "index.arrow", words, struct.pack("<iiii", 0, 1, 0, 1), struct.pack("<iiii", 0, 1, 2**30, 1))
    lists = pa.table({"text": pa.array([[1, 2], [3, 4]])})
    table_file(folder / "list.arrow", lists, struct.pack("<iii", 0, 2, 4), struct.pack("<iii", 0, 2, 2**30))
    table_file(folder / "rows.arrow", pa.table({"text": pa.Array.from_buffers(pa.null(), 1 << 30, [None])}))
    columns = [pa.array(["a"])] * 10_001
    table_file(folder / "columns.arrow", pa.Table.from_arrays(columns, names=[f"c{n}" for n in range(len(columns))]))


def write_texts(folder: Path) -> None:
    write(folder / "deep.jsonl", b'{"a":' * 100_000)
    write(folder / "values.jsonl", b'{"text": "a", "b": [' + b"[]," * 1_100_000 + b"1]}")
    write(folder / "values.json", b'[{"text": "a", "b": [' + b"1," * 4_400_000 + b"1]}]")
    write(folder / "blank.jsonl", b'{"text": "a"}\n' + b"\n" * 250_001)
    write(folder / "columns.csv", b",".join(b"%d" % number for number in range(10_001)) + b"\n")
    write(folder / "lines.jsonl.gz", packed(b" " * (1 << 20), 40, ".gz"))
    write(folder / "line.jsonl.zst", packed(b'{"text": "' + b"x" * (1 << 20), 80, ".zst"))
    write(folder / "quote.csv.zst", packed(b'prompt\n"' + b"x\n" * (1 << 19), 80, ".zst"))
    write(folder / "ratio.jsonl.zst", packed(b'{"text": "' + b"a" * 1000 + b'"}\n', 40_000, ".zst"))
    write(folder / "fields.csv.gz", packed(b'"a\n",' * 50_000, 60, ".gz"))
    with write(folder / "hole.jsonl", b'{"text": "a"}\n').open("r+b") as file:
        file.truncate(1 << 40)
    os.mkfifo(folder / "fifo.jsonl")
    (folder / "memory.jsonl").symlink_to("/proc/self/mem")
    (folder / "zero.csv").symlink_to("/dev/zero")


REFUSED = {
    "before.arrow": "not a Arrow file, or damaged",
    "behind.arrow": "not a Arrow file, or damaged",
    "saved": "not a Arrow file, or damaged",
    "index.arrow": "not a Arrow file, or damaged",
    "list.arrow": "not a Arrow file, or damaged",
    "rows.arrow": "unpacks to more than 5,000 times its size",
    "columns.arrow": "10,001 columns; a file of rows has at most 10,000",
    "deep.jsonl": "objects or lists nested too deep",
    "values.jsonl": "values in one row",
    "values.json": "values in one row",
    "blank.jsonl": "more than 250,000 blank lines",
    "columns.csv": "10,001 columns; a file of rows has at most 10,000",
    "lines.jsonl.gz": "the file has no rows",
    "line.jsonl.zst": "unpacks to more than 5,000 times its size",
    "quote.csv.zst": "a quote that begins in this record has no end",
    "fields.csv.gz": "a quote that begins in this record has no end",
    "ratio.jsonl.zst": "unpacks to more than 5,000 times its size",
    "hole.jsonl": "nothing was written from byte",
    "fifo.jsonl": "it is a FIFO or pipe, not a regular file",
    "memory.jsonl": "it is a file that the kernel makes up (/proc, /sys), not a regular file",
    "zero.csv": "it is a device, not a regular file",
}


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """All of them, read in one process."""
    folder = tmp_path_factory.mktemp("hostile")
    write_tables(folder)
    write_texts(folder)
    damaged_files(folder, [f"short-{number}" for number in range(DAMAGED)])
    return outcomes(folder)


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_a_file_made_to_bring_the_reader_down_is_refused(read: dict[str, Outcome], name: str, reason: str) -> None:
    outcome = read[name]
    assert outcome.died is None
    assert any(name in message and reason in message for message in outcome.messages), outcome.messages


def test_a_file_damaged_at_random_is_read_or_refused(read: dict[str, Outcome]) -> None:
    damaged = [outcome for name, outcome in read.items() if name.startswith("short-")]
    assert len(damaged) == DAMAGED
    assert [outcome for outcome in damaged if outcome.died or not (outcome.rows or outcome.messages)] == []


def test_all_texts_of_a_row_count() -> None:
    user, answer = {"role": "user", "content": "12345"}, {"role": "assistant", "content": "678", "reasoning": "90"}
    assert characters_of(Document("12345")) == 5
    assert characters_of(Conversation([user, answer])) == 10  # type: ignore[list-item]
    assert characters_of(Preference([user], [answer], [answer])) == 15  # type: ignore[list-item]
    called = {**answer, "tool_calls": [{"function": {"name": "f", "arguments": {"a": "x" * 1000}}}]}
    assert characters_of(Conversation([user, called], [{"name": "y" * 500}])) > 1500  # type: ignore[list-item]
    with pytest.raises(RowError, match="6 characters in one row: above data"):
        check_characters(Document("123456"), 5)
