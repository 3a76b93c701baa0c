"""Reading JSONL: line numbers are the file's own, and every bad line is named with what to do."""

from pathlib import Path

import pytest

from finetune.data.rows import MAX_PROBLEMS, Line, Problems, RowError, check_file, read_lines
from finetune.errors import DataError


def lines(tmp_path: Path, content: bytes) -> list[tuple[int, object]]:
    """(line number, the row, or the message about it)."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    return [(line.number, _shown(line)) for line in read_lines(str(path))]


def _shown(line: Line) -> object:
    return str(line.value.problem("rows.jsonl", line.number)) if isinstance(line.value, RowError) else line.value


def test_rows_keep_the_files_line_numbers_over_a_byte_order_mark_blank_lines_and_crlf(tmp_path: Path) -> None:
    assert lines(tmp_path, b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}') == [(1, {"a": 1}), (4, {"a": 2})]


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path: Path) -> None:
    assert lines(tmp_path, '{"a": "x\u2028y\x85z"}\n'.encode()) == [(1, {"a": "x\u2028y\x85z"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1', "rows.jsonl:1: not valid JSON (Expecting ',' delimiter: line 1 column 8 (char 7))"),
        (b"[\n", 'rows.jsonl:1: not valid JSON (Expecting value: line 2 column 1 (char 2)); got "["; write one'),
        (b"[1, 2]", "rows.jsonl:1: a row must be a JSON object; got [1, 2]; write one JSON object a line"),
        (b'"text"', 'rows.jsonl:1: a row must be a JSON object; got "text"'),
        (b'{"a": "\xff"}', "rows.jsonl:1: not UTF-8; got byte 0xff; save the file as UTF-8"),
        (b'{"a": 1, "b": 2, "a": 3}', "rows.jsonl:1: a: the key stands twice in one object; keep one of them"),
        (b"[" * 100_000, "rows.jsonl:1: not valid JSON (maximum recursion depth"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    [(number, got)] = lines(tmp_path, content)
    assert number == 1
    assert str(got).startswith(message)


def test_a_bad_line_does_not_hide_the_ones_after_it(tmp_path: Path) -> None:
    assert [number for number, _ in lines(tmp_path, b'{\n{"a": 1}\n[]\n')] == [1, 2, 3]


def test_all_problems_are_reported_up_to_a_cap_and_the_rest_is_counted() -> None:
    problems = Problems("rows.jsonl")
    for line in range(1, MAX_PROBLEMS + 6):
        problems.add(line, RowError("prompt", "is missing", "add it"))
    with pytest.raises(DataError) as caught:
        problems.raise_if_any()
    printed = str(caught.value).splitlines()
    assert printed[0] == "rows.jsonl:1: prompt: is missing; add it"
    assert len(printed) == MAX_PROBLEMS + 1
    assert printed[-1] == "rows.jsonl: 5 more rows are wrong; mend those above first"


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such data file; got working directory .*; give the path"):
        check_file("nowhere.jsonl")
    with pytest.raises(DataError, match="is not a file; give the path of a JSONL file"):
        check_file(str(tmp_path))
