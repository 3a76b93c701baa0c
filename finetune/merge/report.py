"""The figures of a merge: what `merge-report.json` holds and what the command prints."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from finetune.merge.proof import LogitFigures


@dataclass(frozen=True)
class PartFigures:
    """One part of the model; Frobenius norms over all its targeted tensors."""

    tensors: int
    relative_delta: float  # norm of the delta over norm of the base
    relative_rounding: float | None  # norm of what rounding lost over norm of the delta; None without a delta


@dataclass(frozen=True)
class MergeReport:
    """Everything that was measured; every proof in it has passed."""

    adapter: str
    base: str
    base_fingerprint: str
    fingerprint_recorded: bool  # False: the adapter does not say which base it was trained on
    output: str
    dtypes: tuple[str, ...]
    nbytes: int
    adapter_tensors: int
    tensors: int
    targeted: int
    changed: int
    moved_biases: int  # correction biases of routers, which training had moved
    added_tokens: int  # whose rows of embedding and head are the adapter's
    parts: Mapping[str, PartFigures]
    logits: LogitFigures
    stream_seconds: float
    proof_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def table(self) -> str:
        """A small table to print: one line a proof, one line a part."""
        logits = self.logits
        base = "matches the adapter's record" if self.fingerprint_recorded else "not recorded by the adapter"
        rows = [
            ("base fingerprint", f"{self.base_fingerprint[:12]}, {base}"),
            ("adapter tensors", f"{self.adapter_tensors}, each used exactly once"),
            (
                "tensors on disk",
                f"{self.tensors} ({self.nbytes / 2**30:.2f} GiB {'/'.join(self.dtypes)}), as in the base",
            ),
            ("tensors changed", f"{self.changed} of {self.targeted} targeted, no others"),
            *_bias_lines(self.moved_biases),
            *_added_lines(self.added_tokens, logits),
            *((f"  {name}", _part_line(part)) for name, part in self.parts.items()),
            ("logits", f"{logits.tokens} tokens, fp32"),
            ("  adapter's effect", f"{logits.adapter_effect_mean:.3g} mean difference, base to base + adapter"),
            ("  merged is off by", f"{logits.merged_error_mean:.3g} mean, {logits.merged_error_max:.3g} max"),
            *_routing_lines(logits),
            ("seconds", f"{self.stream_seconds:.1f} to merge, {self.proof_seconds:.1f} to prove"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _part_line(part: PartFigures) -> str:
    line = f"{part.tensors} tensors, delta {part.relative_delta:.2%} of the base's norm"
    return line if part.relative_rounding is None else f"{line}, {part.relative_rounding:.2%} of it rounded off"


def _bias_lines(count: int) -> list[tuple[str, str]]:
    return [("  correction biases", f"{count} tensors, as training left them")] if count else []


def _added_lines(count: int, logits: LogitFigures) -> list[tuple[str, str]]:
    if not count:
        return []
    off = f"their logits are off by {logits.added_error_mean:.3g} of {logits.added_mean:.3g}"
    return [("  added tokens", f"{count}, with the rows that training left; {off}")]


def _routing_lines(logits: LogitFigures) -> list[tuple[str, str]]:
    if logits.rerouted_error_mean is None or logits.other_experts is None:
        return []
    choices = f"{logits.other_experts:.2%} of the choices of experts differ"
    return [("  under equal routing", f"{logits.rerouted_error_mean:.3g} mean; {choices}")]
