"""The figures of a merge: what `merge-report.json` holds and what the command prints."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finetune.cards import merged_card
from finetune.merge.ledger import TensorLog
from finetune.merge.proof import LogitFigures, rounding
from finetune.merge.report_rows import Row, adapter_rows, as_lines, comparison_rows, not_proven_rows, report_rows

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
        """What was left out by `--no-proof`, as phrases."""
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
        """The logits' distances; ValueError where the merge was not proven."""
        if self.proof.logits is None:
            raise ValueError("the merge was not proven")
        return self.proof.logits

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        report = asdict(self)
        return {**report, "proof": {**report["proof"], "not_proven": list(self.proof.not_proven)}}

    def table(self) -> str:
        """The rows to print, in two columns."""
        report = self.as_dict()
        lines = report_lines(report)
        lines.append(("seconds", f"{self.stream_seconds:.1f} to merge, {self.proof_seconds:.1f} to prove"))
        width = max(len(label) for label, _ in lines)
        return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)


def report_lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Everything that a report says, as lines of label and text; `report` is `MergeReport.as_dict()`."""
    compare = report.get("compare")
    data = [] if compare is None else [Row("compared on", compare["data"])]
    rows = [*adapter_rows(report), *report_rows(report), *data, *comparison_rows(compare), *not_proven_rows(report)]
    return as_lines(rows)


def report_card(report: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """The merged model's card; `report` is `MergeReport.as_dict()`, `records` are `finetune.json` of its adapters."""
    return merged_card(report, records, report_rows(report), comparison_rows(report.get("compare")))


def part_figures(log: TensorLog) -> dict[str, PartFigures]:
    """The figures of each part that has a change."""
    figures = {}
    for part, results in log.parts().items():
        base, delta = sum(result.base for result in results), sum(result.delta for result in results)
        figures[part] = PartFigures(
            tensors=len(results),
            relative_delta=math.sqrt(delta / base) if base else 0.0,
            relative_rounding=rounding(results),
        )
    return figures
