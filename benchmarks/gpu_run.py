"""What the sections of `make bench-gpu` share: sizes, clock, bars and raw figures of one run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.budget import Budget
from benchmarks.harness import Bar
from benchmarks.memory import cuda_transient_bytes, transient_bytes
from benchmarks.plan import Plan
from benchmarks.shapes import Shape

GIB = 2**30


@dataclass
class Run:
    """What is measured, for how long, and what has been found so far."""

    plan: Plan
    budget: Budget
    bars: list[Bar] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        """The experts' shape at the first number of tokens."""
        return self.plan.shape(self.plan.tokens[0])

    def transient(self, step: Callable[[], object]) -> int:
        """Most bytes held by a step beyond those before it."""
        return cuda_transient_bytes(step) if self.plan.device == "cuda" else transient_bytes(step)

    def bar(self, ratio: str, at: str, measured: float, sign: Any, limit: float | None, kind: Any = "time") -> None:
        """Note one line of the table, and show it at once."""
        self.bars.append(Bar(ratio, at, measured, sign, limit, kind))
        print(f"  {ratio} [{at}]: {measured:.3f}", flush=True)
