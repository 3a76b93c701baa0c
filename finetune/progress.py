"""What this process is doing, and what is known of its run: read by the messages of a run that ends early.

One object a process, because memory runs out, signals arrive and other processes end anywhere. Imports nothing heavy.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Progress:
    """`recipe` as `finetune.recipe` has it, `config` the base's configuration, `parts` those of the audit."""

    doing: str = "starting"
    step: int | None = None
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
        self.doing, self.step = "training", step

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
    yield
    PROGRESS.doing, PROGRESS.step = before
