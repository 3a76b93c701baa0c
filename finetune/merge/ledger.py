"""What the stream did with each tensor that has a change; the proof and the figures are read from here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What was done to one tensor with a change: sums of squares in fp64, and which rows of which factors went in."""

    key: str
    part: str
    base: float
    delta: float
    rounding: float  # of what rounding to the output dtype lost, in one of every ROUNDING_SAMPLE blocks
    rounded_delta: float  # of the change in the same blocks
    changed: bool  # the change is not zero throughout
    used: tuple[tuple[int, str, int, int, int], ...]  # adapter, path, expert, first row, row past the last

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Outcome":
        """One that went through JSON, where tuples become lists."""
        return cls(**{**entry, "used": tuple(tuple(each) for each in entry["used"])})


@dataclass
class Ledger:
    """What the stream did, tensor by tensor; the proof is read from here."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def targeted(self) -> set[str]:
        """Tensors whose change is not zero."""
        return {key for key, outcome in self.outcomes.items() if outcome.changed}

    def used(self) -> dict[tuple[int, str, int], list[tuple[int, int]]]:
        """By adapter, path and expert, the rows of its change that went to disk: (row, past it)."""
        found: dict[tuple[int, str, int], list[tuple[int, int]]] = {}
        for outcome in self.outcomes.values():
            for owner, path, expert, row, past in outcome.used:
                found.setdefault((owner, path, expert), []).append((row, past))
        return found

    def parts(self) -> dict[str, list[Outcome]]:
        """The outcomes by part of the model."""
        found: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes.values():
            found.setdefault(outcome.part, []).append(outcome)
        return dict(sorted(found.items()))
