"""Lines that a run appends while its disk is full: they wait, in order, and the run goes on."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.run import append_line, read_metrics, repair_lines, write_waiting_lines

LIMIT = 4096
NOTE = "x" * 1100  # three lines fit below the limit, the fourth in part


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "metrics.jsonl"
    (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
    write_waiting_lines(tmp_path)


def limit_files(nbytes: int) -> None:
    """Files of this process end after so many bytes, as they do on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))


@pytest.fixture
def limited() -> Iterator[None]:
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit_files(LIMIT)
    yield
    limit_files(soft)


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


def whole_lines(path: Path) -> int:
    text = path.read_text()
    assert text.endswith("\n"), "half a line stays in the file"
    return text.count("\n")


def test_lines_wait_in_order_and_are_said_once(path: Path, limited: None, capsys: pytest.CaptureFixture[str]) -> None:
    for step in range(1, 8):
        append_line(path, {"step": step, "note": NOTE})
    append_line(path.with_name("router_load.jsonl"), {"step": 7, "note": NOTE * 5})
    assert whole_lines(path) == 3
    assert steps(path) == [1, 2, 3, 4, 5, 6, 7], "what reads the file in this process sees them all"
    out = capsys.readouterr().out
    assert out.count("\n") == 1, "one warning a folder, not one a line"
    assert f"{path}: the file would be larger than is allowed here: 1.10 KiB are needed; got" in out
    assert out.endswith("the run goes on: it keeps its lines in memory until there is space\n")

    limit_files(2**20)
    append_line(path, {"step": 8})
    assert whole_lines(path) == 8
    assert steps(path) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert capsys.readouterr().out == f"{path}: 4 lines that waited for space are written\n"


def test_what_cannot_be_written_until_the_end_is_said(
    path: Path, limited: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in range(1, 7):
        append_line(path, {"step": step, "note": NOTE})
    capsys.readouterr()
    write_waiting_lines(path.parent)
    assert "the last 3 lines of the run are not in this file" in capsys.readouterr().out
    assert steps(path) == [1, 2, 3]


def test_a_run_that_starts_again_in_this_process_forgets_the_steps_that_it_repeats(path: Path, limited: None) -> None:
    for step in range(1, 8):
        append_line(path, {"step": step, "note": NOTE})
    repair_lines(path, last_step=5)
    assert steps(path) == [1, 2, 3, 4, 5]
    repair_lines(path, last_step=2)
    assert steps(path) == [1, 2]


def test_a_file_is_repaired_on_a_full_disk(path: Path, limited: None) -> None:
    for step in (1, 2, 3):
        append_line(path, {"step": step, "note": NOTE})
    with path.open("a") as file:
        file.write('{"step": 4')
    limit_files(0)
    repair_lines(path, last_step=2)
    assert path.read_text().count("\n") == 2
