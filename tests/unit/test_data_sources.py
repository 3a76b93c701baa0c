"""Every kind of file gives the same rows, each with the place at which it begins."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, Features, Json

from finetune.data.row_errors import FileError, RowError
from finetune.data.sources import open_source
from finetune.errors import DataError
from finetune.recipe import DataSource
from tests.sources import ROWS, json_lines, pack, read, values, write, write_table

REAL = Path(__file__).parents[3] / "shared" / "datasets"
ARRAY = json.dumps(ROWS, indent=2).encode()


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
def test_one_object_a_line(tmp_path: Path, suffix: str, packed: str) -> None:
    content = b"\xef\xbb\xbf\n" + json_lines(ROWS).replace(b"\n", b"\r\n \n")
    rows = read(write(tmp_path / f"rows{suffix}{packed}", pack(content, packed)))
    assert [row.value for row in rows] == ROWS
    assert [row.number for row in rows] == [2, 4, 6]


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_file_packed_piece_by_piece(tmp_path: Path, packed: str) -> None:
    pieces = b"".join(pack(json_lines([row]), packed) for row in ROWS)
    assert values(write(tmp_path / f"rows.jsonl{packed}", pieces)) == ROWS


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_of_objects_with_the_line_at_which_each_begins(tmp_path: Path, indent: int, packed: str) -> None:
    content = json.dumps(ROWS, indent=indent).encode()
    rows = read(write(tmp_path / f"rows.json{packed}", pack(content, packed)))
    assert [row.value for row in rows] == ROWS
    begins = [1, 1, 1] if indent is None else [n for n, line in enumerate(content.split(b"\n"), 1) if line == b"  {"]
    assert [row.number for row in rows] == begins


def test_objects_of_several_lines_one_after_another(tmp_path: Path) -> None:
    content = b"\n".join(json.dumps(row, indent=1).encode() for row in ROWS)
    rows = read(write(tmp_path / "rows.json", content))
    assert [row.value for row in rows] == ROWS
    assert [content.split(b"\n")[row.number - 1] for row in rows] == [b"{"] * 3


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("key", ["data", "rows", "x"])
def test_the_one_list_of_rows_of_an_object(tmp_path: Path, key: str, indent: int | None, packed: str) -> None:
    around = {"version": "1.0", "about": {"by": ["a", "]}"], "n": [1, 2]}, "names": ["a"], key: ROWS, "count": 3}
    content = json.dumps(around, indent=indent).encode()
    rows = read(write(tmp_path / f"rows.json{packed}", pack(content, packed)))
    assert [row.value for row in rows] == ROWS
    begins = [n for n, line in enumerate(content.split(b"\n"), 1) if line == b"    {"] or [1, 1, 1]
    assert [row.number for row in rows] == begins[: len(ROWS)]


def test_objects_that_are_rows_are_not_taken_for_their_frame(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}]
    rows: list[dict[str, Any]] = [
        {"messages": turns},
        {"dialog": turns},
        {"tags": [{"name": "a"}], "prompt": "b"},
        {"tags": []},
        {"tags": [1]},
    ]
    for row in rows:
        assert values(write(tmp_path / "r.json", json.dumps(row).encode())) == [row]
    twice = [{"tags": [{"name": "a"}]}] * 2
    assert values(write(tmp_path / "r.json", json_lines(twice))) == twice


def test_an_object_with_several_lists_of_rows_or_a_broken_one(tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", json.dumps({"train": [{"a": 1}], "test": [{"a": 2}]}).encode())
    (row,) = read(path)
    assert isinstance(row.value, FileError)
    assert str(row.value.problem(str(path), row.number)) == (
        f"{path}: the file is one object with several lists of rows: train, test; write each list into a file of its "
        "own"
    )
    broken = read(write(tmp_path / "r.json", b'{"data": [{"a": 1}, 3, {"a": 1, "a": 2}]}'))
    assert [isinstance(row.value, RowError) for row in broken] == [False, True, True]
    (cut,) = read(write(tmp_path / "r.json", b'{"data": [{"a": 1}, {"a": '))
    assert isinstance(cut.value, RowError)


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize(("suffix", "comma"), [(".csv", b","), (".tsv", b"\t")])
def test_records_of_strings_with_the_line_at_which_each_begins(
    tmp_path: Path, suffix: str, comma: bytes, packed: str
) -> None:
    lines = [b"\xef\xbb\xbfprompt,answer", b'"two\r\nlines, ""quoted""",1', b"", b",\xc3\xa9", b"  x , y"]
    content = b"\r\n".join(lines).replace(b",", comma)
    rows = read(write(tmp_path / f"rows{suffix}{packed}", pack(content, packed)))
    assert [(row.number, row.value) for row in rows] == [
        (2, {"prompt": f'two\r\nlines{comma.decode()} "quoted"', "answer": "1"}),
        (5, {"prompt": "", "answer": "é"}),
        (6, {"prompt": "  x ", "answer": " y"}),
    ]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_tables_count_rows(tmp_path: Path, suffix: str) -> None:
    rows = read(write_table(tmp_path / f"rows{suffix}", ROWS, rows_a_group=2))
    assert [(row.number, row.value) for row in rows] == list(enumerate(ROWS, 1))


def test_a_batch_of_more_rows_than_are_held_as_objects_at_a_time(tmp_path: Path) -> None:
    rows = [{"n": n, "turns": [{"content": str(n)}] * (n % 4)} for n in range(2_500)]
    assert values(write_table(tmp_path / "rows.arrow", rows, rows_a_group=2_500)) == rows


def test_the_arrow_file_format_is_read_too(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert values(tmp_path / "rows.arrow") == ROWS


def test_a_folder_of_save_to_disk_is_one_file_of_rows(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).select([2, 0, 1]).save_to_disk(tmp_path / "saved", num_shards=2)
    rows = read(tmp_path / "saved")
    assert [(row.number, row.value) for row in rows] == list(enumerate([ROWS[2], ROWS[0], ROWS[1]], 1))
    assert {row.path for row in rows} == {str(tmp_path / "saved")}


def test_columns_that_datasets_stores_as_json_text_are_what_they_hold(tmp_path: Path) -> None:
    rows = [{"calls": [{"arguments": {"x": 1}}], "any": None}, {"calls": [{"arguments": ["y"]}], "any": "text"}]
    features = Features({"calls": [{"arguments": Json()}], "any": Json()})
    data = Dataset.from_list(rows, features=features)
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "rows.parquet")
    assert values(tmp_path / "saved") == values(tmp_path / "rows.parquet") == data.to_list() == rows


def test_maps_are_dicts_and_missing_fields_of_structs_none(tmp_path: Path) -> None:
    kind = pa.struct([("tags", pa.map_(pa.string(), pa.int64())), ("more", pa.struct([("a", pa.int8())]))])
    table = pa.table({"row": pa.array([{"tags": [("x", 1)], "more": {}}, {"tags": None}], kind)})
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    assert values(tmp_path / "rows.arrow") == [
        {"row": {"tags": {"x": 1}, "more": {"a": None}}},
        {"row": {"tags": None, "more": None}},
    ]


def test_a_row_of_ten_megabytes_between_small_ones(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"a": 1}, {"a": "é" * 5_000_000}, {"a": 2}]
    for name, content in (("r.jsonl", json_lines(rows)), ("r.json", json.dumps(rows, ensure_ascii=False).encode())):
        assert values(write(tmp_path / name, content)) == rows
    assert values(write(tmp_path / "r.csv", b"a\n1\n" + "é".encode() * 5_000_000 + b"\n2\n")) == [
        {"a": str(row["a"])} for row in rows
    ]
    pieces = [{"a": str(row["a"])} for row in rows]
    assert values(write_table(tmp_path / "r.parquet", pieces)) == pieces


def test_a_glob_reads_all_kinds_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path / "b" / "2.json", ARRAY)
    write_table(tmp_path / "b" / "3.parquet", ROWS)
    write(tmp_path / "a" / "c" / "1.jsonl.gz", gzip.compress(json_lines(ROWS)))
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "b" / "4")
    rows = read(tmp_path / "**" / "[1-4]*")
    assert [row.value for row in rows] == ROWS * 4
    assert [row.path for row in rows[::3]] == [
        str(tmp_path / name)
        for name in (
            "a/c/1.jsonl.gz",
            "b/2.json",
            "b/3.parquet",
            "b/4",
        )
    ]
    assert values(tmp_path / "b" / "?.json") == ROWS
    inside = values(tmp_path / "b" / "**")  # the files of the saved folder match too, and are not read twice
    assert inside == ROWS * 3


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    assert values(write(tmp_path / "rows[1].jsonl", json_lines(ROWS))) == ROWS


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz", "r.jsonl.zst", "r.json", "r.csv", "r.parquet", "r.arrow"])
def test_progress_adds_up_to_the_bytes_of_the_files(tmp_path: Path, name: str) -> None:
    rows = [{"a": "x" * 100}] * 50
    content = {"jsonl": json_lines(rows), "json": json.dumps(rows).encode(), "csv": b"a\n" + b"x\n" * 50}
    for folder in ("1", "2"):
        path = write(tmp_path / folder / name, b"")
        kind, packed = Path(name).suffixes[0][1:], "".join(Path(name).suffixes[1:])
        if kind in content:
            write(path, pack(content[kind], packed))
        else:
            write_table(path, rows, rows_a_group=20)
    source = open_source(DataSource(path=f"{tmp_path}/*/{name}", format="auto"))
    assert (source.name, source.unit) == (f"{tmp_path}/*/{name}", "B")
    progress = [row.progress for row in source]
    assert min(progress) >= 0
    assert source.total == sum(path.stat().st_size for path in tmp_path.glob("*/*"))
    end_mark = 8 if name == "r.arrow" else 0  # after the last row
    assert sum(progress) == source.total - end_mark
    assert list(source) == list(source)


@pytest.mark.skipif(not REAL.is_dir(), reason="no data sets beside the repository")
def test_real_files_are_read_as_json_reads_them() -> None:
    for path in REAL.glob("*.json*"):
        text = path.read_text(encoding="utf-8")
        lines = text.split("\n")
        expected = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines if line]
        rows = read(path)
        assert [row.value for row in rows] == expected
        assert {lines[row.number - 1].lstrip()[:1] for row in rows} <= {"{", "["}


class TestFingerprint:
    """The content decides, and how it is read."""

    def of(self, path: Path | str) -> str:
        return open_source(DataSource(path=str(path), format="auto")).fingerprint()

    def test_neither_the_place_nor_the_name_nor_the_time_of_a_file_counts(self, tmp_path: Path) -> None:
        first = write(tmp_path / "rows.jsonl", json_lines(ROWS))
        second = write(tmp_path / "elsewhere" / "other.jsonl", json_lines(ROWS))
        os.utime(second, (1, 1))
        assert self.of(first) == self.of(second)

    def test_every_byte_counts(self, tmp_path: Path) -> None:
        path = write(tmp_path / "rows.jsonl", json_lines(ROWS))
        before = self.of(path)
        path.write_bytes(json_lines(ROWS).replace(b'"n": 2', b'"n": 7'))
        assert self.of(path) != before

    def test_the_order_of_files_and_where_one_ends_count(self, tmp_path: Path) -> None:
        found: set[str] = set()
        for split in ([b"a", b"bc"], [b"ab", b"c"], [b"bc", b"a"], [b"abc"]):
            for index, content in enumerate(split):
                write(tmp_path / str(len(found)) / f"{index}.jsonl", content)
            found.add(self.of(f"{tmp_path}/{len(found)}/*.jsonl"))
        assert len(found) == 4

    def test_the_same_bytes_read_another_way_are_another_content(self, tmp_path: Path) -> None:
        assert self.of(write(tmp_path / "a.csv", b"a\n1\n")) != self.of(write(tmp_path / "a.tsv", b"a\n1\n"))

    def test_a_saved_folder_is_known_by_its_rows(self, tmp_path: Path) -> None:
        for name, rows in (("a", ROWS), ("b", ROWS), ("c", ROWS[:2])):
            Dataset.from_list(rows).save_to_disk(tmp_path / name)
        assert self.of(tmp_path / "a") == self.of(tmp_path / "b") != self.of(tmp_path / "c")


def refusal(path: Path | str) -> list[str]:
    with pytest.raises(DataError) as caught:
        open_source(DataSource(path=str(path), format="auto"))
    return str(caught.value).splitlines()


class TestRefusedPaths:
    """What cannot be opened is said before anything is read."""

    def test_no_such_file(self) -> None:
        [message] = refusal("nowhere/rows.jsonl")
        assert message == (
            f"nowhere/rows.jsonl: no such data file; got working directory {os.getcwd()}; "
            "give the path of a data file, relative to the folder the command is run in"
        )

    def test_a_name_of_the_hub(self) -> None:
        [message] = refusal("owner/instructions")
        assert message.endswith("a data set on the Hugging Face hub is named by id instead of path")

    def test_a_glob_without_a_match(self, tmp_path: Path) -> None:
        [message] = refusal(tmp_path / "*.jsonl")
        assert message == (
            f"{tmp_path}/*.jsonl: no file matches; got working directory {os.getcwd()}; "
            "give a file, a glob such as data/*.jsonl, or a folder of datasets.save_to_disk"
        )

    def test_a_folder(self, tmp_path: Path) -> None:
        assert refusal(tmp_path) == [f"{tmp_path}: is a folder; write a glob, such as {tmp_path}/*.jsonl"]

    def test_a_folder_of_several_splits(self, tmp_path: Path) -> None:
        data = Dataset.from_list([{"a": 1}])
        DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "d")
        assert refusal(tmp_path / "d") == [
            f"{tmp_path}/d: is a folder of several splits; got train, test; "
            f"give the folder of one: {tmp_path}/d/train or {tmp_path}/d/test"
        ]

    def test_a_saved_folder_that_lost_a_file(self, tmp_path: Path) -> None:
        Dataset.from_list([{"a": 1}]).save_to_disk(tmp_path / "d")
        (tmp_path / "d" / "data-00000-of-00001.arrow").unlink()
        [message] = refusal(tmp_path / "d")
        assert message.endswith(
            "data-00000-of-00001.arrow: cannot be read (No such file or directory); "
            "check that it exists and can be read"
        )

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("state.json", b"{", "is damaged; got Expecting property name"),
            ("state.json", b"\xff", "is damaged; got 'utf-8' codec can't decode byte 0xff"),
            ("state.json", b'{"a":' * 100_000, "is damaged; got nested too deeply"),
            ("state.json", b'{"_data_files": 5}', "is damaged: it has no list _data_files; got 5"),
            ("state.json", b'{"_data_files": {"filename": "a"}}', "is damaged: it has no list _data_files; got {"),
            ("state.json", b'{"_data_files": [5]}', "names a file outside its folder, or none at all; got 5"),
            ("state.json", b'{"_data_files": [{"filename": "../a"}]}', "names a file outside its folder, or none"),
            ("state.json", b'{"_data_files": [{"filename": "/etc/passwd"}]}', "names a file outside its folder"),
            ("state.json", b'{"_data_files": [{"filename": "a\\u0000b"}]}', "names a file outside its folder"),
            ("dataset_dict.json", b"[]", "is damaged: it has no list splits; got []"),
            ("dataset_dict.json", b'{"splits": ["../x"]}', "names a file outside its folder"),
        ],
    )
    def test_a_saved_folder_whose_index_is_damaged(
        self, tmp_path: Path, name: str, content: bytes, message: str
    ) -> None:
        write(tmp_path / "d" / name, content)
        [refused] = refusal(tmp_path / "d")
        assert refused.startswith(f"{tmp_path}/d/{name}: {message}")
        assert refused.endswith("; save or copy the folder again")

    def test_a_saved_folder_that_names_a_file_twice(self, tmp_path: Path) -> None:
        write(tmp_path / "d" / "state.json", b'{"_data_files": [{"filename": "a"}, {"filename": "a"}]}')
        assert refusal(tmp_path / "d") == [
            f"{tmp_path}/d/state.json: names a file twice; save or copy the folder again"
        ]

    @pytest.mark.parametrize("name", ["state.json", "dataset_dict.json", "data-00000-of-00001.arrow"])
    def test_a_saved_folder_with_a_fifo_in_it(self, tmp_path: Path, name: str) -> None:
        Dataset.from_list([{"a": 1}]).save_to_disk(tmp_path / "d")
        (tmp_path / "d" / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / "d" / name)
        [refused] = refusal(tmp_path / "d")
        assert "it is a FIFO or pipe, not a regular file" in refused

    def test_a_saved_folder_that_names_no_file(self, tmp_path: Path) -> None:
        write(tmp_path / "d" / "state.json", b"{}")
        assert "whose state.json names no file; save or copy it again" in refusal(tmp_path / "d")[0]

    def test_a_saved_folder_with_an_index_of_its_own(self, tmp_path: Path) -> None:
        write(tmp_path / "d" / "state.json", b'{"_indices_data_files": [{"filename": "x"}]}')
        assert "is a save_to_disk folder of an old version, with an index; save it again" in refusal(tmp_path / "d")[0]

    def test_all_that_is_wrong_is_said_at_once(self, tmp_path: Path) -> None:
        write(tmp_path / "1.xlsx", b"")
        write(tmp_path / "2", b"")
        write(tmp_path / "3.parquet.gz", b"")
        (tmp_path / "4.jsonl").symlink_to(tmp_path / "gone")
        os.mkfifo(tmp_path / "5.jsonl")
        read = ".jsonl, .ndjson, .json, .csv, .tsv (each also with .gz or .zst), .parquet, .arrow"
        advice = f"the suffix does not say what kind of file this is; got suffix .xlsx; use one of {read}"
        assert [message.removeprefix(f"{tmp_path}/") for message in refusal(tmp_path / "*")] == [
            f"1.xlsx: {advice}",
            f"2: {advice.replace('suffix .xlsx', 'no suffix')}",
            "3.parquet.gz: .parquet files are read as they are, not packed; got suffix .parquet.gz; unpack it",
            f"4.jsonl: a link to a file that does not exist; got {tmp_path}/gone; fix the link",
            "5.jsonl: it is a FIFO or pipe, not a regular file; "
            "give a file, a glob such as data/*.jsonl, or a folder of datasets.save_to_disk",
        ]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_a_file_that_may_not_be_read(self, tmp_path: Path) -> None:
        write(tmp_path / "rows.jsonl", b"{}").chmod(0)
        assert refusal(tmp_path / "rows.jsonl")[0].endswith(
            "cannot be read (Permission denied); check that it exists and can be read"
        )


def test_values_that_are_no_json_stay_what_they_are(tmp_path: Path) -> None:
    kinds: dict[str, Any] = {"when": pa.date32(), "price": pa.decimal128(5, 2), "raw": pa.binary(), "x": pa.float32()}
    table = pa.table({name: pa.nulls(1, kind) for name, kind in kinds.items()})
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    assert values(tmp_path / "rows.arrow") == [dict.fromkeys(kinds)]
