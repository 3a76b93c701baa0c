"""What this process is doing, and what is known of its run: read by the messages of a run that ends early.

One object a process, because memory runs out, signals arrive and other processes end anywhere. Imports nothing heavy.

The launcher, which learns that a signal has ended a process, cannot ask that process for its step. So each process
keeps what it is doing in a file in the launcher's memory.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHARED = "FINETUNE_PROGRESS"
"""Environment variable: the launcher's file, with a record for each of its processes."""

CONTINUE = "the same command continues"
"""The end of each message about a process that was lost."""

_RECORD_BYTES = 64


@dataclass
class Progress:
    """`step` while it is trained, `reached`: the last one, also in an evaluation, or while it is saved.

    `recipe` as `finetune.recipe` has it, `config` the base's configuration, `parts` those of the audit.
    """

    doing: str = "starting"
    step: int | None = None
    reached: int | None = None
    recipe: Any = None
    run: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    base_bytes: int = 0
    parts: Sequence[Mapping[str, Any]] = ()
    audit_table: str = ""

    def __str__(self) -> str:
        return self.doing if self.step is None else f"{self.doing}, step {self.step}"

    def begin_step(self, step: int) -> None:
        """Training, step `step`; an evaluation or a checkpoint before it is over."""
        self.doing, self.step, self.reached = "training", step, step
        self.share()

    def report(self) -> str:
        """What other processes read."""
        return self.doing if self.reached is None else f"{self.doing}, step {self.reached}"

    def share(self) -> None:
        """Let the launcher of this process know; what it cannot be told is left out of its message."""
        if path := os.environ.get(SHARED):
            with suppress(OSError):
                record = self.report().encode()[:_RECORD_BYTES].ljust(_RECORD_BYTES)
                descriptor = os.open(path, os.O_WRONLY)
                try:
                    os.pwrite(descriptor, record, int(os.environ.get("LOCAL_RANK", "0")) * _RECORD_BYTES)
                finally:
                    os.close(descriptor)

    def saved(self) -> str:
        """What of the run is on disk, for the end of a message."""
        if self.run is None:
            return ""
        if (self.run / "adapter").is_dir():
            return f"the adapter is saved: {self.run / 'adapter'}"
        numbers = [path.name.rpartition("-")[2] for path in self.run.glob("checkpoint-*") if path.is_dir()]
        steps = sorted(int(number) for number in numbers if number.isdecimal())
        if not steps:
            return "no checkpoint was saved yet"
        return f"saved: {self.run / f'checkpoint-{steps[-1]}'}"


PROGRESS = Progress()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """`name` is what the process is doing; after an error it stays, so that the message can say it."""
    before = PROGRESS.doing, PROGRESS.step
    PROGRESS.doing, PROGRESS.step = name, None
    PROGRESS.share()
    yield
    PROGRESS.doing, PROGRESS.step = before
    PROGRESS.share()


def shared_file() -> int | None:
    """Of a launcher: a file in its memory for `Progress.share`, named in the environment of what it starts.

    None where the system has no such files (only Linux has).
    """
    if not hasattr(os, "memfd_create"):
        return None
    descriptor = os.memfd_create("progress")
    os.environ[SHARED] = f"/proc/{os.getpid()}/fd/{descriptor}"
    return descriptor


def shared_by(descriptor: int | None, local_rank: int) -> str:
    """What a process of this launcher was doing last; empty where it has not said so."""
    if descriptor is None:
        return ""
    return os.pread(descriptor, _RECORD_BYTES, local_rank * _RECORD_BYTES).decode(errors="replace").strip("\0 ")


def ended_line(rank: int, host: str, how: str, doing: str, memory: bool = False, do: str = CONTINUE) -> str:
    """The last line of a run of several processes of which one has ended.

    `how`: such as "signal 9", empty where it is not known; `doing`: its last report; `memory`: the kernel has
    ended a process because memory was used up.
    """
    line = f"rank {rank} on {host} ended{how and f' ({how})'}{when(doing)}"
    if memory:
        line += ", just when the kernel ended a process because memory was used up"
        line += "; take a machine or a container with more memory, or settings that need less"
    return f"{line}; {do}"


def when(doing: str) -> str:
    """A report as the end of a clause: ` at step 3`, ` while loading the base`, ` at step 4 while evaluating`."""
    doing, _, step = doing.partition(", step ")
    if step:
        return f" at step {step}" + (f" while {doing}" if doing != "training" else "")
    return f" while {doing}" if doing else ""
