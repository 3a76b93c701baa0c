"""A clock that keeps a benchmark inside its time: fewer rounds when it runs late, a reason for what is left out."""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.harness import REPEATS


class NotMeasuredError(Exception):
    """A measurement that was not taken; its text says why."""


@dataclass
class Budget:
    """Seconds from `started` (`time.monotonic`) that all measurements together may take."""

    seconds: float
    started: float = field(default_factory=time.monotonic)
    skipped: dict[str, str] = field(default_factory=dict)  # section -> reason
    failed: dict[str, str] = field(default_factory=dict)  # section -> traceback
    took: dict[str, float] = field(default_factory=dict)  # section -> seconds

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.started + self.seconds - time.monotonic()

    def rounds(self, least: int) -> Callable[[float], int]:
        """How many rounds to take, given the seconds of one: `REPEATS`, fewer when late; an error below `least`."""

        def decide(round_seconds: float) -> int:
            affordable = int(self.left / max(round_seconds, 1e-9))
            if affordable < least:
                raise NotMeasuredError(
                    f"{least} rounds take {least * round_seconds:.0f} s; {max(self.left, 0):.0f} s were left"
                )
            return min(REPEATS, affordable)

        return decide

    def section(self, name: str, measure: Callable[[], object]) -> None:
        """One part of the benchmark. An error is printed and kept, and does not stop the others."""
        print(f"\n=== {name} ({max(self.left, 0):.0f} s left)", flush=True)
        started = time.monotonic()
        try:
            if self.left <= 0:
                raise NotMeasuredError("no time left")
            measure()
        except NotMeasuredError as reason:
            self.skipped[name] = str(reason)
            print(f"SKIPPED: {reason}", flush=True)
        except torch.OutOfMemoryError as error:
            cause = ". ".join(str(error).splitlines()[0].split(". ")[:2])  # what follows is a page of advice
            self.skipped[name] = f"out of memory: {cause}"
            print(f"SKIPPED: {self.skipped[name]}", flush=True)
        except Exception as error:
            self.failed[name] = traceback.format_exc()
            print(f"FAILED: {type(error).__name__}: {error}\n{self.failed[name]}", flush=True)
        finally:
            self.took[name] = time.monotonic() - started
