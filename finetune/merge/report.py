"""The figures of a merge: the contents of `merge-report.json` and `merge-times.json`, and their rows as text.

The rows are worded once, for the terminal, the model card and `finetune inspect`.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from finetune.cards import merged_card
from finetune.merge.proof import LogitFigures, rounding
from finetune.merge.stream import TensorLog

Facts = Mapping[str, Any]
SHOWN_TENSORS = 3
_HASH = re.compile(r"\b[0-9a-f]{64}\b")
SHORT_HASH = 12  # characters of a SHA-256 where lines are narrow


class Row(NamedTuple):
    """One fact of the report."""

    label: str
    value: str
    remark: str = ""  # unit, or what the value means


def report_rows(report: Facts) -> list[Row]:
    """Base, tensors and logits; `report` is `MergeReport.as_dict()`. No row holds a path of this machine."""
    proof = report["proof"]
    recorded = all(adapter["base_recorded"] for adapter in report["adapters"])
    through = report.get("through_nf4")
    rows = [
        Row("merged into", f"{report['into']} base", f"{through} tensors through NF4" if through else ""),
        *_effect_rows(report),
        Row(
            "base fingerprint",
            report["base_fingerprint"],
            "matches the adapter's record" if recorded else "not recorded by the adapter",
        ),
        Row("adapter tensors", str(proof["adapter_tensors"]), "each used exactly once"),
        Row("tensors on disk", str(proof["tensors"]), f"{_size(report)}, {names_and_shapes(report)}"),
    ]
    if proof.get("changed") is not None:
        rows.append(Row("tensors changed", f"{proof['changed']} of {report['targeted']} targeted", "no others"))
    return [*rows, *_other_rows(report), *_part_rows(report["parts"]), *_logit_rows(proof.get("logits"))]


def _effect_rows(report: Facts) -> list[Row]:
    """What must be said of parts of the model, or of all of it, on which the adapters have no effect."""
    unchanged = [name for name, part in report["parts"].items() if part["relative_delta"] == 0]
    if not unchanged:
        return []
    others = report.get("added_tokens") or report.get("whole_tensors") or report["proof"].get("moved_biases")
    if len(unchanged) == len(report["parts"]) and not others:
        return [Row("NO EFFECT", "every B is zero", "so the merged model is the base: the adapter was not trained")]
    return [Row("NO EFFECT", f"on {', '.join(unchanged)}", "where every B is zero: it was not trained")]


def adapter_rows(report: Facts) -> list[Row]:
    """One row an adapter, with its folder, and one with the template's variables where it was trained with some."""
    rows = []
    for adapter in report["adapters"]:
        named = f"{adapter['weight']:g} x {adapter['name_or_path']}"
        rows.append(Row("adapter", named, f"SHA-256 {adapter['sha256']}"))
        if args := adapter.get("template_args"):
            rows.append(Row("prompts with", f"chat_template_kwargs={json.dumps(args)}", "as in its training"))
    return rows


def comparison_rows(compare: Facts | None) -> list[Row]:
    """The losses that `--compare` measured, and the advice that follows; `compare` is `Comparison` as a dict."""
    if compare is None:
        return []
    return [
        Row("base + adapter", f"loss {compare['trained_loss']:.4f}", _rows_compared(compare)),
        *(
            Row(f"into {name} base", f"loss {merged['loss']:.4f}", f"KL {merged['kl']:.3g} per token from the adapter")
            for name, merged in compare["into"].items()
        ),
        *(
            Row(f"NF4 rounding error, {part}", f"{ratio:.3g}", "x the norm of the delta")
            for part, ratio in compare["shift"].items()
        ),
        Row("advice", compare["advice"]),
    ]


def not_proven_rows(report: Facts) -> list[Row]:
    """What `--no-proof` left out."""
    return [Row("NOT PROVEN", phrase) for phrase in report["proof"]["not_proven"]]


def as_lines(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Label and text for narrow lines: hashes are shortened."""
    return [(row.label, ", ".join(_shortened(text) for text in (row.value, row.remark) if text)) for row in rows]


def _shortened(text: str) -> str:
    return _HASH.sub(lambda match: match.group()[:SHORT_HASH], text)


def names_and_shapes(report: Facts) -> str:
    """How the names and shapes of a merge's tensors compare with the base's."""
    count, whole = report.get("added_tokens"), report.get("whole_tensors")
    differences = [
        *(["embedding and head, one matrix in the base, are two"] if report.get("untied") else []),
        *([f"embedding and head have rows for {count} added tokens"] if count else []),
        *([f"{len(whole)} are the adapter's"] if whole else []),
    ]
    return "with the names and shapes of the base" + (f", but: {'; '.join(differences)}" if differences else "")


def _size(report: Facts) -> str:
    return f"{report['nbytes'] / 2**30:.2f} GiB {'/'.join(report['dtypes'])}"


def _rows_compared(compare: Facts) -> str:
    return f"on {compare['tokens']} supervised tokens of {compare['rows']} rows"


def _other_rows(report: Facts) -> list[Row]:
    """What an adapter brings besides LoRA factors."""
    added, moved = report.get("added_tokens"), report["proof"].get("moved_biases")
    whole, logits = report.get("whole_tensors") or (), report["proof"].get("logits") or {}
    more = f" and {len(whole) - SHOWN_TENSORS} more" if len(whole) > SHOWN_TENSORS else ""
    error = logits.get("added_error_mean")
    measured = "" if error is None else f"; their logits are off by {error:.3g} of {logits['added_mean']:.3g}"
    return [
        *([Row("router biases", f"{moved} tensors", "as training left them")] if moved else []),
        *([Row("whole tensors", str(len(whole)), ", ".join(whole[:SHOWN_TENSORS]) + more)] if whole else []),
        *([Row("embedding, head", "two matrices", "the base's one cannot hold both")] if report.get("untied") else []),
        *([Row("added tokens", str(added), f"with the rows that training left{measured}")] if added else []),
    ]


def _part_rows(parts: Facts) -> list[Row]:
    rows = []
    for name, part in parts.items():
        lost = part.get("relative_rounding")
        rounded = "" if lost is None else f", {lost:.2%} of it lost in rounding"
        value = f"{part['relative_delta']:.2%} of the base's norm"
        rows.append(Row(f"change of {name}", value, f"in {part['tensors']} tensors{rounded}"))
    return rows


def _logit_rows(logits: Facts | None) -> list[Row]:
    if logits is None:
        return []
    rows = [
        Row("tokens compared", str(logits["tokens"]), "logits in fp32"),
        Row("adapter's effect", f"{logits['adapter_effect_mean']:.3g}", "mean difference, base to base + adapter"),
        Row(
            "error of the merge",
            f"{logits['merged_error_mean']:.3g}",
            f"mean difference from base + adapter, {logits['merged_error_max']:.3g} max",
        ),
    ]
    if logits.get("rerouted_error_mean") is not None and logits.get("other_experts") is not None:
        choices = f"{logits['other_experts']:.2%} of the expert choices differ"
        rows.append(Row("with equal routing", f"{logits['rerouted_error_mean']:.3g}", f"mean difference; {choices}"))
    return rows


COMPARE_ROWS = 128  # rows that are measured where the user does not say
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


TIMES_FILE = "merge-times.json"
"""Beside `merge-report.json`, and not in the list of checksums."""
_OF_ONE_MERGE = ("output", "stream_seconds", "proof_seconds")


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
        """For JSON: the same for every merge of the same adapters into the same base."""
        report = {name: value for name, value in asdict(self).items() if name not in _OF_ONE_MERGE}
        return {**report, "proof": {**report["proof"], "not_proven": list(self.proof.not_proven)}}

    def times(self) -> dict[str, Any]:
        """For JSON: what differs between two merges of the same adapters."""
        return {name: getattr(self, name) for name in _OF_ONE_MERGE}

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


def report_card(report: Facts, records: Sequence[Facts], output: str) -> str:
    """The card of the merged model in `output`; `records` are `finetune.json` of its adapters.

    `report` is `MergeReport.as_dict()`.
    """
    return merged_card(report, records, output, report_rows(report), comparison_rows(report.get("compare")))


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
