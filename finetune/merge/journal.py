"""The journal of an unfinished merge: which tensors are whole on disk, so that `--resume` need not make them again."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.checkpoint import UnfinishedError
from finetune.errors import Problem
from finetune.files import write_text

JOURNAL_FILE = ".merge-journal.jsonl"


class Journal:
    """A file in the unfinished folder: the first line says which merge it is, each other one which tensors are whole.

    Written only after the disk has taken the tensors (the caller sees to that), so it never promises too much.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any], resume: bool) -> None:
        """`job`: everything that decides the output; a journal of another job is a WeightsError on resuming."""
        self.path = folder / JOURNAL_FILE
        self.done: dict[str, dict[str, Any] | None] = {}
        lines = self._lines() if resume else []
        self.resumed = bool(lines)
        begun = json.loads(json.dumps(job))
        if self.resumed:
            self._go_on(begun, lines)
        else:
            _empty(folder)  # what a kill left that nothing is known of
            self._append(begun)

    def _lines(self) -> list[dict[str, Any]]:
        """What can be read: a line that a kill cut short is the last one, and what it would say is made again."""
        lines: list[dict[str, Any]] = []
        if self.path.is_file():
            for text in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
                with suppress(ValueError):
                    lines.append(json.loads(text))
        return lines

    def _go_on(self, job: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        begun, *entries = lines
        if begun != job:
            differs = sorted(key for key in job if begun.get(key) != job[key])
            what = "the unfinished merge there is another one"
            do = "give the same adapters, base and options, or leave out --resume to begin anew"
            raise UnfinishedError(Problem(str(self.path.parent), what, do, got=f"another {', '.join(differs)}"))
        for entry in entries:
            self.done |= entry
        # Without what was cut short, so that the next line stands alone.
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def add(self, entries: Mapping[str, Mapping[str, Any] | None]) -> None:
        """Note tensors that are whole on disk, with what was done to them (None: copied)."""
        self._append(entries)

    def _append(self, value: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Take the file away: the weights are complete."""
        self.path.unlink(missing_ok=True)


def _empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
