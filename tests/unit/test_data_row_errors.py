"""What is wrong with rows is collected over all files, in order, and printed up to a cap."""

import pytest

from finetune.data.row_errors import MAX_PROBLEMS, FileError, Problems, RowError, shown
from finetune.errors import DataError


def report(problems: Problems) -> list[str]:
    with pytest.raises(DataError) as caught:
        problems.raise_if_any()
    return str(caught.value).splitlines()


def test_all_problems_are_reported_up_to_a_cap_and_the_rest_is_counted() -> None:
    problems = Problems()
    for line in range(1, MAX_PROBLEMS + 6):
        problems.add("rows.jsonl", line, RowError("prompt", "is missing", "add it"))
    printed = report(problems)
    assert printed[0] == "rows.jsonl:1: prompt: is missing; add it"
    assert len(printed) == MAX_PROBLEMS + 1
    assert printed[-1] == "rows.jsonl: 5 more rows are wrong; fix those above first"


def test_problems_of_several_files_keep_their_order_and_the_rest_names_its_files() -> None:
    problems = Problems(limit=2)
    for path, number in (("a.jsonl", 3), ("b.csv", 2), ("a.jsonl", 7), ("c.json", 1), ("c.json", 9)):
        problems.add(path, number, RowError("x", "is wrong", "fix it", "1"))
    assert report(problems) == [
        "a.jsonl:3: x: is wrong; got 1; fix it",
        "b.csv:2: x: is wrong; got 1; fix it",
        "a.jsonl and 1 more file: 3 more rows are wrong; fix those above first",
    ]
    assert problems.count == 5


def test_one_row_more_than_is_printed() -> None:
    problems = Problems(limit=1)
    problems.add("a.jsonl", 1, RowError(None, "is wrong", "fix it"))
    problems.add("a.jsonl", 2, RowError(None, "is wrong", "fix it"))
    assert report(problems)[-1] == "a.jsonl: 1 more row is wrong; fix those above first"


def test_what_is_wrong_with_a_file_as_a_whole_has_no_line() -> None:
    assert str(FileError("is broken", "copy it again").problem("a.gz", 0)) == "a.gz: is broken; copy it again"
    assert str(FileError("is broken", "copy it again").problem("a.gz", 5)) == "a.gz:5: is broken; copy it again"


def test_without_problems_nothing_is_raised() -> None:
    Problems().raise_if_any()


def test_values_are_shown_as_json_cut_short_and_always_printable() -> None:
    cyclic: list[object] = []
    cyclic.append(cyclic)
    assert shown({"a": None}) == '{"a": null}'
    assert shown("x" * 100_000) == '"' + "x" * 59 + "..."
    assert shown("é\ud800") == '"é\\ud800"'
    assert shown(cyclic) == "a list"
