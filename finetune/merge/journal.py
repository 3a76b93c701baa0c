"""The journal of an unfinished merge: which tensors are whole on disk, so that `--resume` need not make them again.

A killed process loses nothing of what it has written, a machine that stops may lose what the disk has not taken yet. So
the journal also says when the disk was waited for, and since when the machine runs: after another start of the machine
only what came before the last wait counts.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.checkpoint import UnfinishedError
from finetune.errors import Problem
from finetune.files import write_text

JOURNAL_FILE = ".merge-journal.jsonl"


_ON_DISK = {"on disk": True}
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Journal:
    """A file in the unfinished folder: first which merge it is, then tensors that are whole, and waits for the disk."""

    def __init__(self, folder: Path, job: Mapping[str, Any], resume: bool) -> None:
        """`job`: everything that decides the output; a journal of another job is a WeightsError on resuming."""
        self.path = folder / JOURNAL_FILE
        self.done: dict[str, dict[str, Any] | None] = {}
        lines = self._lines() if resume else []
        self.resumed = bool(lines)
        begun = json.loads(json.dumps(job))
        if self.resumed:
            self._go_on(begun, lines)
            _empty(folder, (JOURNAL_FILE, "model*.safetensors"))
        self.resumed = bool(self.done)
        if not self.resumed:
            _empty(folder, ())  # what a kill left that nothing is known of
            self._append({"job": begun, "boot": _boot()})

    def _lines(self) -> list[dict[str, Any]]:
        """What can be read: a line that a kill cut short is the last one, and what it would say is made again."""
        lines: list[dict[str, Any]] = []
        if self.path.is_file():
            for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
                with suppress(ValueError):
                    lines.append(json.loads(text))
        return [line for line in lines if isinstance(line, dict)]

    def _go_on(self, job: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        begun, *entries = lines
        if begun.get("job") != job:
            then = begun.get("job")
            differs = sorted(key for key in job if not isinstance(then, dict) or then.get(key) != job[key])
            what = "the unfinished merge there is another one"
            do = "give the same adapters, base and options, or leave out --resume to begin anew"
            raise UnfinishedError(Problem(str(self.path.parent), what, do, got=f"another {', '.join(differs)}"))
        if begun.get("boot") is None or begun["boot"] != _boot():
            waits = [number for number, entry in enumerate(entries) if entry == _ON_DISK]
            entries = entries[: waits[-1] + 1] if waits else []
        for entry in entries:
            self.done |= {} if entry == _ON_DISK else entry
        # Without what was cut short, so that the next line stands alone.
        text = "".join(json.dumps(line) + "\n" for line in [{"job": job, "boot": _boot()}, *entries])
        write_text(self.path, text)

    def add(self, entries: Mapping[str, Mapping[str, Any] | None]) -> None:
        """Note tensors that were written whole, with what was done to them (None: copied)."""
        self._append(entries)

    def on_disk(self) -> None:
        """Note that the disk has taken everything that was added so far."""
        self._append(_ON_DISK)

    def _append(self, value: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")

    def remove(self) -> None:
        """Take the file away: the weights are complete."""
        self.path.unlink(missing_ok=True)


def _empty(folder: Path, kept: tuple[str, ...]) -> None:
    for path in folder.iterdir():
        if any(path.match(each) for each in kept):
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _boot() -> str | None:
    """One name for as long as the machine runs; None where the system has none."""
    return BOOT_ID.read_text(encoding="utf-8").strip() if BOOT_ID.is_file() else None
