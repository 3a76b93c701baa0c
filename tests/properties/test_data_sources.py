"""Whatever the kind of file, the same rows come out; and no bytes whatever bring the readers down."""

import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.row_errors import RowError
from finetune.data.sources.json_files import parse_text
from finetune.data.sources.tables import rows_of
from tests.sources import json_lines, pack, read, write

few = settings(max_examples=60, deadline=None)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
anything = st.recursive(
    st.none() | st.booleans() | numbers | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
objects = st.lists(st.dictionaries(text, anything, max_size=4), min_size=1, max_size=6)

TURN = pa.struct([("role", pa.string()), ("content", pa.string()), ("weight", pa.int64())])
SCHEMA = pa.schema([("turns", pa.list_(TURN)), ("text", pa.string()), ("scores", pa.list_(pa.float64()))])
turns = st.fixed_dictionaries(
    {"role": text, "content": text | st.none(), "weight": st.integers(-(2**63), 2**63 - 1) | st.none()}
)
rows_of_a_table = st.lists(
    st.fixed_dictionaries(
        {
            "turns": st.lists(turns | st.none(), max_size=3) | st.none(),
            "text": text | st.none(),
            "scores": st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=2),
        }
    ),
    min_size=1,
    max_size=8,
)


def found(name: str, content: bytes) -> list[tuple[int, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return [(row.number, row.value) for row in read(write(Path(folder, name), content))]


def not_a_frame(rows: list[Any]) -> list[Any]:
    """The rows; a single one with a key of rows, because a .json file of one object may be the frame of its rows."""
    return rows if len(rows) > 1 else [{**rows[0], "text": ""}]


@few
@given(objects, st.sampled_from(["", ".gz", ".zst"]), st.sampled_from([None, 0, 3]), st.booleans())
def test_lines_an_array_and_packed_files_give_the_same_rows(
    rows: list[Any], packed: str, indent: int | None, escaped: bool
) -> None:
    rows = not_a_frame(rows)
    lines = json_lines(rows)
    assert found(f"r.jsonl{packed}", pack(lines, packed)) == list(enumerate(rows, 1))
    assert found(f"r.json{packed}", pack(lines, packed)) == list(enumerate(rows, 1))
    array = json.dumps(rows, indent=indent, ensure_ascii=escaped)
    assert [row for _, row in found(f"r.json{packed}", pack(array.encode(), packed))] == rows
    if indent is not None:
        rows = not_a_frame(
            [row for row in rows if row] or [{"a": 1}]
        )  # {} looks like a line of its own, whatever follows
    one_after_another = "\n".join(json.dumps(row, indent=indent, ensure_ascii=escaped) for row in rows)
    numbered = found(f"r.json{packed}", pack(one_after_another.encode(), packed))
    assert [row for _, row in numbered] == rows
    assert [one_after_another.split("\n")[number - 1][0] for number, _ in numbered] == ["{"] * len(rows)


@few
@given(rows_of_a_table, st.integers(1, 5), st.integers(1, 5))
def test_tables_give_the_rows_that_lines_give(rows: list[dict[str, Any]], rows_a_batch: int, cut: int) -> None:
    # A slice of a larger table, as files of a shuffled or filtered set have them.
    table = pa.Table.from_pylist([*rows[-cut:], *rows, *rows[:cut]], SCHEMA).slice(min(cut, len(rows)), len(rows))
    assert list(rows_of(table)) == rows
    parquet, stream, file = (pa.BufferOutputStream() for _ in range(3))
    pq.write_table(table, parquet, row_group_size=rows_a_batch)
    with pa.ipc.new_stream(stream, SCHEMA) as writer:
        writer.write_table(table, max_chunksize=rows_a_batch)
    with pa.ipc.new_file(file, SCHEMA) as writer:
        writer.write_table(table, max_chunksize=rows_a_batch)
    expected = found("r.jsonl", json_lines(rows))
    assert found("r.parquet", parquet.getvalue().to_pybytes()) == expected
    assert found("r.arrow", stream.getvalue().to_pybytes()) == expected
    assert found("r.arrow", file.getvalue().to_pybytes()) == expected


@few
@given(st.data(), st.sampled_from([".csv", ".tsv"]), st.sampled_from(["", ".gz", ".zst"]))
def test_records_come_back_as_they_were_written(data: st.DataObject, suffix: str, packed: str) -> None:
    cell = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=10)
    names = data.draw(st.lists(st.from_regex("[a-z]{1,3}", fullmatch=True), unique=True, min_size=1, max_size=4))
    records = data.draw(st.lists(st.fixed_dictionaries(dict.fromkeys(names, cell)), min_size=1, max_size=5))
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, names, dialect="excel" if suffix == ".csv" else "excel-tab")
    writer.writeheader()
    writer.writerows(records)
    rows = found(f"r{suffix}{packed}", pack(written.getvalue().encode(), packed))
    assert [row for _, row in rows] == records


brackets = st.text(st.sampled_from('{}[],:"\\ \n\r\t1a;é\ud800'), max_size=40)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60) | brackets.map(lambda text: text.encode("utf-8", "surrogatepass")))
@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.jsonl.gz", "r.json.zst", "r.parquet", "r.arrow"])
def test_any_bytes_give_rows_or_messages(name: str, content: bytes) -> None:
    rows = found(name, content)
    assert rows
    for number, value in rows:
        if isinstance(value, RowError):
            str(value.problem(name, number)).encode()
        else:
            assert isinstance(value, dict)
            json.dumps(value, ensure_ascii=False).encode()
    numbers = [number for number, _ in rows]
    assert numbers == sorted(numbers)


@settings(max_examples=300, deadline=None)
@given(st.lists(brackets, max_size=3).map("".join) | anything.map(json.dumps))
def test_what_is_taken_for_a_row_is_what_json_says(text: str) -> None:
    value = parse_text(text.strip())
    if not isinstance(value, RowError):
        assert value == json.loads(text)
