"""Files of JSON lines that a run appends to, each line on disk before the next step starts.

A disk that refuses a line does not end the run: what it refuses waits in memory, is said once, and is written in its
order by the first append that finds space. Readers in this process see the waiting lines as well.
"""

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

from finetune.errors import DiskError, Problem, RunError
from finetune.files import disk_named, write_text
from finetune.run.checkpoints import SET_ASIDE

_WAITING: dict[Path, list[str]] = {}  # by file, those with lines that their disk has refused


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append one JSON object and sync it to disk, or keep it for the next append."""
    key = path.absolute()
    waiting = _WAITING.get(key, [])
    lines = [*waiting, json.dumps(line, allow_nan=False) + "\n"]
    problem = _write(path, lines)
    if problem is not None:
        if not any(other.parent == key.parent for other in _WAITING):
            print(f"{problem}; the run goes on: it keeps its lines in memory until there is space", flush=True)
        _WAITING[key] = lines
    elif _WAITING.pop(key, None):
        print(f"{path}: {_lines(len(waiting))} that waited for space are written", flush=True)


def write_waiting_lines(folder: Path) -> None:
    """The last attempt, at the end of a run: write what waits for space in `folder`, and say what could not be."""
    for key in [key for key in _WAITING if key.parent == folder.absolute()]:
        lines = _WAITING.pop(key)
        if problem := _write(folder / key.name, lines):
            print(f"{problem}; the last {_lines(len(lines))} of the run are not in this file", flush=True)


def _lines(count: int) -> str:
    return f"{count} line{'s' * (count > 1)}"


def _write(path: Path, lines: list[str]) -> Problem | None:
    """Append all of them or none; what the disk says if it refuses."""
    content = "".join(lines).encode()
    try:
        with disk_named(path, len(content)):
            _append(path, content)
    except DiskError as error:
        return error.problems[0]
    return None


def _append(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    start = os.fstat(descriptor).st_size
    try:
        while content:
            content = content[os.write(descriptor, content) :]
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, start)  # a part of a line would spoil the file for its readers
        raise
    finally:
        os.close(descriptor)


_OF_THE_END = {"train_loss", "train_runtime"}


def repair_lines(path: Path, last_step: int) -> None:
    """Leave the file without an incomplete last line, without later steps, and without the line of the run's end."""

    def kept(line: dict[str, Any]) -> bool:
        return line["step"] <= last_step and not _OF_THE_END & line.keys()

    path = path.absolute()
    if waiting := [text for text in _WAITING.pop(path, []) if kept(json.loads(text))]:
        _WAITING[path] = waiting
    if not path.exists():
        return
    before = path.read_bytes().decode("utf-8", errors="replace")
    *complete, _incomplete = before.split("\n")
    parsed = [_as_line(line) for line in complete]
    if None in parsed:
        _keep_damaged(path, parsed.index(None) + 1)
    after = "".join(f"{text}\n" for text, line in zip(complete, parsed, strict=True) if line and kept(line))
    if before == after:
        return
    if before.startswith(after):
        os.truncate(path, len(after.encode()))  # needs no space
    else:
        write_text(path, after)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every complete line, in order, with those that still wait for space; an incomplete last line is skipped."""
    waiting = _WAITING.get(path.absolute(), [])
    if waiting and not path.exists():
        complete = []
    else:
        *complete, _incomplete = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    lines = [_parse(path, number, line) for number, line in enumerate(complete, start=1)]
    return [*lines, *map(json.loads, waiting)]


def _keep_damaged(path: Path, number: int) -> None:
    """Copy a file that the disk or another program has damaged; the run goes on with the lines that can be read."""
    place = path.parent / SET_ASIDE
    place.mkdir(exist_ok=True)
    copy = next(free for count in itertools.count() if not (free := place / f"{path.name}.{count}").exists())
    shutil.copyfile(path, copy)
    print(
        f"{path}:{number}: not a line that a run has written; the file is kept as {copy}, the rest is used", flush=True
    )


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    value = _as_line(line)
    if value is None:
        do = "continue the run, which keeps a copy and the other lines, or remove the line"
        raise RunError(Problem(f"{path}:{number}", "not a line that a run has written", do, got=repr(line[:80])))
    return value


def _as_line(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None
