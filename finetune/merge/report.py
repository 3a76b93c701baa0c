"""The figures of a merge: what `merge-report.json` holds and what the command prints."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from finetune.merge.ledger import TensorLog
from finetune.merge.proof import LogitFigures, rounding

NOT_PROVEN = (
    "that no other tensor changed, and that each change survived rounding",
    "that the merged model gives the logits of base + adapter",
)


@dataclass(frozen=True)
class PartFigures:
    """One part of the model; Frobenius norms over all its targeted tensors."""

    tensors: int
    relative_delta: float  # norm of the delta over norm of the base
    relative_rounding: float | None  # norm of what rounding lost over norm of the delta, sampled; None without a delta


@dataclass(frozen=True)
class Proof:
    """What was proven; None for what `--no-proof` left out."""

    adapter_tensors: int  # each used exactly once
    tensors: int  # with the names and shapes that `names_and_shapes` describes
    changed: int | None = None  # all that are targeted, and no others
    moved_biases: int | None = None  # correction biases of routers, which training had moved
    logits: LogitFigures | None = None

    @property
    def not_proven(self) -> tuple[str, ...]:
        """What nobody has looked at, as phrases."""
        return NOT_PROVEN if self.logits is None else ()


@dataclass(frozen=True)
class Candidate:
    """How a merge, rounded to the output's number format, does on the rows of `--compare`."""

    loss: float  # mean over the supervised tokens, nats
    kl: float  # mean of KL(trained || merged) over the same tokens, nats


@dataclass(frozen=True)
class Comparison:
    """What `--compare` measured. `trained` is base + adapter in the arithmetic of fp32, which all are compared with."""

    data: str
    rows: int
    tokens: int  # supervised ones
    trained_loss: float
    into: Mapping[str, Candidate]
    unmeasured: str | None  # why there is one merge only
    shift: Mapping[str, float]  # by part: norm of (16-bit base - what its NF4 stands for) over norm of the delta
    advice: str


@dataclass(frozen=True)
class MergeReport:
    """Everything that was measured; every proof in it has passed."""

    adapters: tuple[Mapping[str, Any], ...]  # name_or_path, sha256 of the weights, weight, base_recorded
    base: str
    base_fingerprint: str
    into: str  # "original", or "dequantized": what 4-bit training saw
    through_nf4: int  # tensors of the base that hold what their NF4 stands for; 0 into the original
    output: str
    fingerprint: str  # of the merged checkpoint
    dtypes: tuple[str, ...]
    nbytes: int
    targeted: int
    added_tokens: int  # whose rows of embedding and head are the adapter's
    whole_tensors: tuple[str, ...]  # that are an adapter's, be they changed by factors or not
    untied: bool  # embedding and head are two matrices, of one in the base
    parts: Mapping[str, PartFigures]
    proof: Proof
    stream_seconds: float
    proof_seconds: float
    compare: Comparison | None = None

    @property
    def logits(self) -> LogitFigures:
        """The logits' distances; ValueError where nobody has looked at them."""
        if self.proof.logits is None:
            raise ValueError("the merge was not proven")
        return self.proof.logits

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self)
        return {**found, "proof": {**found["proof"], "not_proven": list(self.proof.not_proven)}}

    def table(self) -> str:
        """A small table to print: one line a proof, one line a part."""
        proof = self.proof
        unrecorded = [each for each in self.adapters if not each["base_recorded"]]
        base = "not recorded by the adapter" if unrecorded else "matches what the adapter records"
        rows = [
            ("base fingerprint", f"{self.base_fingerprint[:12]}, {base}"),
            *_into_lines(self.into, self.through_nf4),
            *_adapter_lines(self.adapters),
            ("adapter tensors", f"{proof.adapter_tensors}, each used exactly once"),
            (
                "tensors on disk",
                f"{proof.tensors} ({self.nbytes / 2**30:.2f} GiB {'/'.join(self.dtypes)}), "
                f"{names_and_shapes(asdict(self))}",
            ),
            *(
                []
                if proof.changed is None
                else [("tensors changed", f"{proof.changed} of {self.targeted} targeted, no others")]
            ),
            *_bias_lines(proof.moved_biases),
            *_whole_lines(self.whole_tensors, self.untied),
            *_added_lines(self.added_tokens, proof.logits),
            *((f"  {name}", _part_line(part)) for name, part in self.parts.items()),
            *_logit_lines(proof.logits),
            *_compare_lines(self.compare),
            *(("NOT PROVEN", text) for text in proof.not_proven),
            ("seconds", f"{self.stream_seconds:.1f} to merge, {self.proof_seconds:.1f} to prove"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def part_figures(log: TensorLog) -> dict[str, PartFigures]:
    """The figures of each part that has a change."""
    found = {}
    for part, results in log.parts().items():
        base, delta = sum(each.base for each in results), sum(each.delta for each in results)
        found[part] = PartFigures(
            tensors=len(results),
            relative_delta=math.sqrt(delta / base) if base else 0.0,
            relative_rounding=rounding(results),
        )
    return found


def names_and_shapes(report: Mapping[str, Any]) -> str:
    """How the names and shapes of a merge's tensors compare with the base's; `report`: `MergeReport.as_dict()`."""
    count, whole = report.get("added_tokens"), report.get("whole_tensors")
    other = [
        *(["embedding and head, one matrix in the base, are two"] if report.get("untied") else []),
        *([f"embedding and head have the rows that {count} added tokens need"] if count else []),
        *([f"{len(whole)} are as the adapter brings them"] if whole else []),
    ]
    return "with the names and shapes of the base" + (f", but: {'; '.join(other)}" if other else "")


def _into_lines(into: str, through_nf4: int) -> list[tuple[str, str]]:
    return [("merged into", f"{into} base: {through_nf4} tensors through NF4")] if through_nf4 else []


def _adapter_lines(adapters: tuple[Mapping[str, Any], ...]) -> list[tuple[str, str]]:
    if len(adapters) == 1 and adapters[0]["weight"] == 1:
        return []
    return [("adapter", f"{each['weight']:g} x {each['name_or_path']} ({each['sha256'][:12]})") for each in adapters]


def _part_line(part: PartFigures) -> str:
    line = f"{part.tensors} tensors, delta {part.relative_delta:.2%} of the base's norm"
    return line if part.relative_rounding is None else f"{line}, {part.relative_rounding:.2%} of it rounded off"


def _bias_lines(count: int | None) -> list[tuple[str, str]]:
    return [("  correction biases", f"{count} tensors, as training left them")] if count else []


def _whole_lines(whole: tuple[str, ...], untied: bool) -> list[tuple[str, str]]:
    found = [("  whole tensors", f"{len(whole)} are the adapter's: {', '.join(whole[:3])}")] if whole else []
    return [*found, ("  embedding, head", "two matrices: the base's one cannot hold both")] if untied else found


def _added_lines(count: int, logits: LogitFigures | None) -> list[tuple[str, str]]:
    if not count:
        return []
    off = (
        f"their logits are off by {logits.added_error_mean:.3g} of {logits.added_mean:.3g}" if logits else "not proven"
    )
    return [("  added tokens", f"{count}, with the rows that training left; {off}")]


def _logit_lines(logits: LogitFigures | None) -> list[tuple[str, str]]:
    if logits is None:
        return []
    return [
        ("logits", f"{logits.tokens} tokens, fp32"),
        ("  adapter's effect", f"{logits.adapter_effect_mean:.3g} mean difference, base to base + adapter"),
        ("  merged is off by", f"{logits.merged_error_mean:.3g} mean, {logits.merged_error_max:.3g} max"),
        *_routing_lines(logits),
    ]


def _compare_lines(compare: Comparison | None) -> list[tuple[str, str]]:
    if compare is None:
        return []
    merges = {f"  into {name}": each for name, each in compare.into.items()}
    lines = [
        ("compared on", f"{compare.data}: {compare.tokens} supervised tokens of {compare.rows} rows"),
        ("  base + adapter", f"loss {compare.trained_loss:.4f}"),
        *(
            (name, f"loss {each.loss:.4f}, KL {each.kl:.3g} per token from what was trained")
            for name, each in merges.items()
        ),
        *((f"  {part}", f"NF4 moved the base by {ratio:.3g} x the delta") for part, ratio in compare.shift.items()),
    ]
    return [*lines, ("  advice", compare.advice)]


def _routing_lines(logits: LogitFigures) -> list[tuple[str, str]]:
    if logits.rerouted_error_mean is None or logits.other_experts is None:
        return []
    choices = f"{logits.other_experts:.2%} of the choices of experts differ"
    return [("  under equal routing", f"{logits.rerouted_error_mean:.3g} mean; {choices}")]
