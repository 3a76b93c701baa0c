"""Bad input: one clear line each, with file and line, all of it collected, nothing skipped silently."""

import errno
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.data.row_errors import FileError, RowError
from finetune.data.sources import data_files, local
from tests.sources import json_lines, messages, pack, read, values, write, write_table

JSONL = "write one JSON object a line (JSONL), UTF-8"
FIX = "fix the file here: nothing after this place was read"
AGAIN = "copy or download it again"


def one(path: Path, content: bytes) -> str:
    """The one message about a file."""
    [message] = messages(write(path, content))
    return message


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', f"""not valid JSON (Expecting ',' delimiter at character 8); got "{{\\"a\\": 1"; {JSONL}"""),
        (b'{"a": 1} x', f'not valid JSON (Extra data at character 9); got "{{\\"a\\": 1}} x"; {JSONL}'),
        (b'"text"', f'a row must be a JSON object; got "text"; {JSONL}'),
        (b"[1, 2]", f"a row must be a JSON object; got [1, 2]; {JSONL}"),
        (b"null", f"a row must be a JSON object; got null; {JSONL}"),
        (b'{"a": "\xff"}', "not UTF-8; got byte 0xff; save the file as UTF-8"),
        (b'{"b": 0, "a": 1, "a": 2}', "a: the key occurs twice in one object; keep one of them"),
        (b'{"m": [{"role": 1, "role": 2}]}', "role: the key occurs twice in one object; keep one of them"),
        (b'{"a": NaN}', "NaN is not JSON; got NaN; write null, a number, or leave the key out"),
        (b'{"a": -Infinity}', "-Infinity is not JSON; got -Infinity; write null, a number, or leave the key out"),
        (b'{"a": ["x", "\\ud83d!"]}', "a[1]: half of a surrogate pair; got \"'\\\\ud83d!'\"; fix the \\u escapes"),
        (b'{"m": {"\\uDE00": 1}}', "m: half of a surrogate pair; got \"'\\\\ude00'\"; fix the \\u escapes"),
        (b'{"a": "tab\there"}', "not valid JSON (Invalid control character at at character 11); got "),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON (Exceeds the limit (4300 digits) for integer string"),
        (b"[" * 100_000, "objects or lists nested too deep; got "),
    ],
)
def test_a_line_that_is_no_row_is_named_and_does_not_hide_the_others(
    tmp_path: Path, suffix: str, line: bytes, message: str
) -> None:
    path = write(tmp_path / f"r{suffix}", b'{"a": 0}\n' + line + b'\n\n{"a": 1}\n{\n')
    first, second = messages(path)
    where = f"r{suffix}:2: "
    assert first.startswith(where + message)
    assert second.startswith(f"r{suffix}:5: not valid JSON (Expecting property name enclosed in double quotes")
    assert [value for value in values(path) if isinstance(value, dict)] == [{"a": 0}, {"a": 1}]


def test_a_whole_pair_of_surrogates_is_no_problem(tmp_path: Path) -> None:
    for name, content in (("r.jsonl", b'{"a": "\\ud83d\\ude00"}'), ("r.json", b'[{"a": "\\ud83d\\ude00"}]')):
        assert values(write(tmp_path / name, content)) == [{"a": "😀"}]


class TestAFileOfAnotherShape:
    """The name says one thing, the content another."""

    @pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
    def test_an_array_where_lines_were_expected(self, tmp_path: Path, packed: str) -> None:
        assert one(tmp_path / f"r.jsonl{packed}", pack(b'\n [{"a": 1}]', packed)) == (
            f"r.jsonl{packed}:2: a JSON array where one object a line was expected; "
            f"rename it to .json{packed}, or {JSONL}"
        )

    def test_an_object_over_several_lines_where_lines_were_expected(self, tmp_path: Path) -> None:
        content = json.dumps({"a": [1], "b": 2}, indent=2).encode()
        what = "an object over several lines where one object a line was expected"
        assert one(tmp_path / "r.jsonl", content) == f"r.jsonl:1: {what}; rename it to .json, or {JSONL}"

    @pytest.mark.parametrize(
        ("content", "what"),
        [
            (gzip.compress(b"{}", mtime=0), "this is gzip, not what its name says; add .gz to its name"),
            (pack(b"{}", ".zst"), "this is Zstandard, not what its name says; add .zst to its name"),
            (b"PAR1xxxx", "this is Parquet, not what its name says; name it .parquet"),
            (b"ARROW1xx", "this is Arrow, not what its name says; name it .arrow"),
            (b"PK\x03\x04xx", "this is ZIP, not what its name says; unpack it"),
            ('{"a": 1}'.encode("utf-16"), "this is UTF-16 text, not what its name says; save it as UTF-8"),
            (b"\xfe\xff\x00{", "this is UTF-16 text, not what its name says; save it as UTF-8"),
        ],
    )
    @pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv"])
    def test_another_kind_of_file(self, tmp_path: Path, name: str, content: bytes, what: str) -> None:
        assert one(tmp_path / name, content) == f"{name}: {what}"

    @pytest.mark.parametrize("name", ["r.jsonl.gz", "r.json.gz", "r.csv.gz"])
    def test_not_gzip_at_all(self, tmp_path: Path, name: str) -> None:
        got = "Not a gzipped file (b'{\"')"
        what = f"not the format of its suffix, or damaged; got {got}; {AGAIN}, or give it the right suffix"
        assert one(tmp_path / name, b'{"a": 1}') == f"{name}: {what}"

    def test_not_zstandard_at_all(self, tmp_path: Path) -> None:
        message = one(tmp_path / "r.jsonl.zst", b'{"a": 1}')
        assert message.startswith("r.jsonl.zst: not the format of its suffix, or damaged; got ZSTD decompress failed")

    @pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
    def test_not_a_table_at_all(self, tmp_path: Path, suffix: str) -> None:
        kind = suffix[1:].capitalize()
        message = one(tmp_path / f"r{suffix}", b'{"a": 1}\n' * 9)
        assert message.startswith(f"r{suffix}: not a {kind} file, or damaged; got ")
        assert message.endswith(AGAIN)


class TestATruncatedFile:
    """What stands before the break is read, and the break is no end of the file."""

    ROWS = tuple({"n": n, "text": f"{n * 7919**9 % 10**12}"} for n in range(20_000))

    @pytest.mark.parametrize("packed", [".gz", ".zst"])
    @pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
    def test_packed(self, tmp_path: Path, kind: str, packed: str) -> None:
        content = {
            ".jsonl": json_lines(self.ROWS),
            ".json": json.dumps(self.ROWS, indent=0).encode(),
            ".csv": b"n,text\n" + b"".join(f'{row["n"]},"{row["text"]}"\n'.encode() for row in self.ROWS),
        }[kind]
        whole = pack(content, packed)
        rows = read(write(tmp_path / f"r{kind}{packed}", whole[: len(whole) * 2 // 3]))
        *sound, broken = rows
        assert len(sound) > 9_000
        assert all(isinstance(row.value, dict) for row in sound)
        assert [int(row.value["n"]) for row in sound if isinstance(row.value, dict)] == list(range(len(sound)))
        assert isinstance(broken.value, FileError)
        assert str(broken.value.problem("r", broken.number)) == (
            f"r:{broken.number}: the compressed file is truncated; {AGAIN}"
        )
        lines_a_row = 4 if kind == ".json" else 1
        assert 0 <= broken.number - sound[-1].number <= lines_a_row

    def test_damaged_in_the_middle(self, tmp_path: Path) -> None:
        content = bytearray(gzip.compress(json_lines(self.ROWS)))
        content[-8:-4] = b"\0\0\0\0"
        *sound, broken = read(write(tmp_path / "r.jsonl.gz", bytes(content)))
        assert (len(sound), broken.number) == (20_000, 20_001)
        assert isinstance(broken.value, FileError)
        assert str(broken.value.got).startswith("CRC check failed")

    def test_the_last_line_of_a_plain_file(self, tmp_path: Path) -> None:
        assert one(tmp_path / "r.jsonl", b'{"a": 1}\n{"a": "x').startswith("r.jsonl:2: not valid JSON (Unterminated")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'[{"a": 1},\n{"a": "x', "r.json:2: the row that begins here does not end; got "),
            (b'[{"a": 1}\n,\n', f"r.json:3: the array does not end; {AGAIN}"),
            (b'[{"a": 1}\n', f"r.json:2: the array does not end; {AGAIN}"),
            (b'{\n"a": 1}\n{"a":\n', "r.json:3: the row that begins here does not end; got "),
        ],
    )
    def test_json(self, tmp_path: Path, content: bytes, message: str) -> None:
        *sound, broken = read(write(tmp_path / "r.json", content))
        assert [row.value for row in sound] == [{"a": 1}]
        assert isinstance(broken.value, FileError)
        assert str(broken.value.problem("r.json", broken.number)).startswith(message)

    @pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
    def test_tables(self, tmp_path: Path, suffix: str) -> None:
        path = write_table(tmp_path / f"r{suffix}", [{"a": "x" * 100}] * 100, rows_a_group=10)
        message = one(path, path.read_bytes()[:3000])
        assert f"not a {suffix[1:].capitalize()} file, or damaged; got " in message
        assert message.endswith(AGAIN)

    def test_a_table_damaged_in_the_middle(self, tmp_path: Path) -> None:
        path = tmp_path / "r.parquet"
        pq.write_table(pa.table({"a": ["x" * 100] * 3000}), path, row_group_size=1000, use_dictionary=False)
        content = bytearray(path.read_bytes())
        start = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
        content[start : start + 20] = b"\xff" * 20
        *sound, broken = read(write(path, bytes(content)))
        assert len(sound) == 2000
        assert isinstance(broken.value, FileError)


class TestABrokenArray:
    """In an array a broken object is one bad row; where no row can be told any more, the file is broken."""

    def test_the_rows_after_a_broken_one_are_read(self, tmp_path: Path) -> None:
        path = write(
            tmp_path / "r.json", b'[{"a": 1},\n {"a": },\n {"a": "\xff"},\n 5,\n {"a": 2, "a": 3},\n {"a": 4}]'
        )
        assert messages(path) == [
            f'r.json:2: not valid JSON (Expecting value at character 7); got "{{\\"a\\": }}"; {JSONL}',
            "r.json:3: not UTF-8; got byte 0xff; save the file as UTF-8",
            f"r.json:4: a row must be a JSON object; got 5; {JSONL}",
            "r.json:5: a: the key occurs twice in one object; keep one of them",
        ]
        assert values(path)[::5] == [{"a": 1}, {"a": 4}]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (
                b'[{"a": 1}\n {"a": 2}]',
                f'r.json:2: a comma or ] was expected after the row; got "{{\\"a\\": 2}}]"; {FIX}',
            ),
            (b'[{"a": 1},\n]', f'r.json:2: a row was expected; got "]"; {FIX}'),
            (b'[{"a": 1}]\n{"a": 2}', f'r.json:2: text after the end of the array; got "{{\\"a\\": 2}}"; {FIX}'),
        ],
    )
    def test_what_holds_the_array_together(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = write(tmp_path / "r.json", content)
        assert messages(path) == [message]
        assert isinstance(values(path)[-1], FileError)

    def test_nesting_without_an_end(self, tmp_path: Path) -> None:
        assert one(tmp_path / "r.json", b"[" * 100_000).startswith("r.json:1: the row that begins here does not end")

    def test_objects_across_the_pieces_that_are_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = [{"a": 'é"{[' * n, "n": n} for n in range(40)]
        content = json.dumps(rows, indent=1, ensure_ascii=False).encode()
        path = write(tmp_path / "r.json", content)
        expected = read(path)
        for size in (1, 7, 64):
            monkeypatch.setattr("finetune.data.sources.json_files.BUFFER", size)
            assert read(path) == expected
        assert [row.value for row in expected] == rows


def test_a_number_is_not_cut_where_a_piece_that_is_read_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.data.sources.json_files.BUFFER", 1)
    assert [message.split("; ")[1] for message in messages(write(tmp_path / "r.json", b"[12, true, 3.5]"))] == [
        "got 12",
        "got true",
        "got 3.5",
    ]


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.tsv", "r.jsonl.gz", "r.csv.zst"])
@pytest.mark.parametrize("content", [b"", b"\n \r\n\t\n", b"\xef\xbb\xbf"])
def test_an_empty_file_and_one_of_blank_lines(tmp_path: Path, name: str, content: bytes) -> None:
    if name.endswith(("csv", "tsv", "zst")) and content.strip(b"\n\r\xef\xbb\xbf"):
        content = b"\n\r\n\n"  # white space is a column name there
    packed = Path(name).suffix if name.endswith(("gz", "zst")) else ""
    empty = "the file has no rows; fill it or leave it out"
    assert one(tmp_path / name, pack(content, packed)) == f"{name}: {empty}"


@pytest.mark.parametrize("name", ["r.json", "r.csv", "r.parquet", "r.arrow"])
def test_a_file_with_a_frame_and_no_row(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name in ("r.json", "r.csv"):
        write(path, {"r.json": b"[\n]", "r.csv": b"a,b\n"}[name])
    else:
        table = pa.schema([("a", pa.string())]).empty_table()
        pq.write_table(table, path) if name == "r.parquet" else _stream(path, table)
    assert messages(path) == [f"{name}: the file has no rows; fill it or leave it out"]


def _stream(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


class TestCsv:
    """The header decides; every record must fit it."""

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            (
                b"1",
                '1 fields where the header has 2; got ["1"]; if a field has a separator or a line break in it, '
                'put it in quotes and double those inside ("")',
            ),
            (b"1,2,3", "3 fields where the header has 2; got "),
            (
                b'"x" y,2',
                "a quote inside a field (',' expected after '\"'); put the field in quotes and double those "
                'inside ("")',
            ),
            (b"x\ry,2", "a carriage return without a line feed; end lines with LF or CR LF, or quote the field"),
            (b"x\0,2", "a NUL byte: binary data, or UTF-16; save the file as UTF-8"),
            (b'"x\n\xff",2', "not UTF-8; got byte 0xff; save the file as UTF-8"),
        ],
    )
    def test_a_record_that_does_not_fit(self, tmp_path: Path, record: bytes, message: str) -> None:
        path = write(tmp_path / "r.csv", b"a,b\n1,2\n" + record + b"\n3,4\n")
        assert messages(path)[0].startswith(f"r.csv:3: {message}")
        assert [value for value in values(path) if isinstance(value, dict)] == [
            {"a": "1", "b": "2"},
            {"a": "3", "b": "4"},
        ]

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            (
                b",a",
                'column 1 has no name; got ["", "a"]; the first line must name every column (pandas writes the row '
                "numbers without a name unless index=False)",
            ),
            (b"a,b,a", 'two columns are named "a"; got ["a", "b", "a"]; the first line must name each column once'),
            (
                b"a;b",
                'the header has one column, with ";" in its name; got ["a;b"]; .csv wants another separator: write '
                "commas",
            ),
            (
                b"a\tb",
                'the header has one column, with "\\t" in its name; got ["a\\tb"]; .csv wants another separator: '
                "name it .tsv",
            ),
            (b"a,\xff", "not UTF-8; got byte 0xff; save the file as UTF-8"),
        ],
    )
    def test_a_header_that_names_no_columns(self, tmp_path: Path, header: bytes, message: str) -> None:
        path = write(tmp_path / "r.csv", header + b"\n1,2\n")
        assert messages(path) == [f"r.csv:1: {message}"]
        assert isinstance(values(path)[0], FileError)

    def test_commas_in_a_tsv_file(self, tmp_path: Path) -> None:
        assert one(tmp_path / "r.tsv", b"a,b\n1,2\n").endswith(".tsv wants another separator: name it .csv")

    def test_a_quote_without_an_end_swallows_the_file_and_is_named_where_it_begins(self, tmp_path: Path) -> None:
        path = write(tmp_path / "r.csv", b'a,b\n1,2\n"3,4\n5,6\n7,8\n')
        assert messages(path) == [
            "r.csv:3: a quote that begins in this record has no end; "
            'put the field in quotes and double those inside ("")'
        ]
        assert isinstance(values(path)[-1], FileError)


def test_two_columns_of_one_name_in_a_table(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(table, tmp_path / "r.parquet")
    _stream(tmp_path / "r.arrow", table)
    for name in ("r.parquet", "r.arrow"):
        assert messages(tmp_path / name) == [f'{name}: two columns are named "a"; name each column once']


def test_a_value_of_a_table_that_python_cannot_hold_is_one_bad_row(tmp_path: Path) -> None:
    offsets, data = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")
    text = pa.Array.from_buffers(pa.string(), 2, [None, offsets, data])
    maps = pa.array([[("k", 1)], [("k", 1), ("k", 2)]], pa.map_(pa.string(), pa.int64()))
    for name, column in (("text.arrow", text), ("maps.arrow", maps)):
        _stream(tmp_path / name, pa.table({"a": column}))
        first, second = read(tmp_path / name)
        assert isinstance(first.value, dict)
        assert isinstance(second.value, RowError)
        message = str(second.value.problem(name, second.number))
        assert message.startswith(f"{name}:2: a value that cannot be read; got ")
        assert message.endswith("; fix or remove the row")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "r.arrow:1: a value that cannot be read; got Expecting property name"),
        ('{"a": 1, "a": 2}', "r.arrow:1: a: the key occurs twice in one object; keep one of them"),
    ],
)
def test_a_json_column_that_holds_none(tmp_path: Path, text: str, message: str) -> None:
    column = pa.ExtensionArray.from_storage(pa.json_(), pa.array([text, '{"b": 1}']))
    _stream(tmp_path / "r.arrow", pa.table({"j": column}))
    assert messages(tmp_path / "r.arrow")[0].startswith(message)
    assert values(tmp_path / "r.arrow")[1] == {"j": {"b": 1}}


def test_a_row_without_an_end_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("json_files", "tables"):
        monkeypatch.setattr(f"finetune.data.sources.{module}.MAX_ROW_BYTES", 1 << 20)
    endless = b"x" * (3 << 20)
    cases = {
        "r.jsonl": (b'{"a": "' + endless, "r.jsonl:1: a line of more than 1 MiB; write one JSON object a line"),
        "r.json": (b'[{"a": "' + endless, "r.json:1: the row that begins here has more than 1 MiB; got "),
        "r.csv": (b'a\n"' + endless, "r.csv:2: a line of more than 1 MiB; write one record a line"),
    }
    for name, (content, message) in cases.items():
        assert one(tmp_path / name, content).startswith(message)
    lines = b"y\n" * (1 << 20)
    [row] = read(write(tmp_path / "quote.csv", b'a\n"' + lines + lines))
    assert isinstance(row.value, FileError)
    assert str(row.value.problem("r", row.number)).startswith("r:2: a quote that begins in this record has no end")


def test_a_file_that_breaks_does_not_hide_the_next_one(tmp_path: Path) -> None:
    write(tmp_path / "1.jsonl.gz", b"no gzip")
    write(tmp_path / "2.jsonl", b'{"a": 1}\n{\n')
    write(tmp_path / "3.jsonl", b"")
    write(tmp_path / "4.jsonl", b'{"a": 2}\n')
    rows = read(tmp_path / "*")
    kinds = [(Path(row.path).name, row.number, type(row.value)) for row in rows]
    assert kinds == [
        ("1.jsonl.gz", 0, FileError),
        ("2.jsonl", 1, dict),
        ("2.jsonl", 2, RowError),
        ("3.jsonl", 0, FileError),
        ("4.jsonl", 1, dict),
    ]


def test_a_disk_that_fails_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(file: Any, place: data_files.Place) -> Any:
        place.number = 7
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setitem(local.READERS, ".jsonl", failing)
    assert one(tmp_path / "r.jsonl", b"{}") == ("r.jsonl:7: cannot be read (Input/output error); check the disk")
