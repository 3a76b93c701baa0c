"""The log of a merge: what was done to each tensor with a change. Proof and figures are computed from it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TensorResult:
    """What was done to one tensor with a change: sums of squares in fp64, and which rows of which factors went in."""

    key: str
    part: str
    base: float
    delta: float
    rounding: float  # of what rounding to the output dtype lost, in one of every ROUNDING_SAMPLE blocks
    rounded_delta: float  # of the change in the same blocks
    changed: bool  # the change is not zero throughout
    used: tuple[tuple[int, str, int, int, int], ...]  # adapter, path, expert, first row, row past the last


@dataclass
class TensorLog:
    """The results of all tensors with a change, by key."""

    results: dict[str, TensorResult] = field(default_factory=dict)

    @property
    def targeted(self) -> set[str]:
        """Tensors whose change is not zero."""
        return {key for key, result in self.results.items() if result.changed}

    def used(self) -> dict[tuple[int, str, int], list[tuple[int, int]]]:
        """By adapter, path and expert, the rows of its change that went to disk: (row, past it)."""
        rows: dict[tuple[int, str, int], list[tuple[int, int]]] = {}
        for result in self.results.values():
            for owner, path, expert, row, past in result.used:
                rows.setdefault((owner, path, expert), []).append((row, past))
        return rows

    def parts(self) -> dict[str, list[TensorResult]]:
        """The results by part of the model."""
        parts: dict[str, list[TensorResult]] = {}
        for result in self.results.values():
            parts.setdefault(result.part, []).append(result)
        return dict(sorted(parts.items()))
