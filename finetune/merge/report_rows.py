"""The rows of a merge report, worded once: the command prints them, `finetune inspect` and the model card show them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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


def adapter_rows(report: Facts) -> list[Row]:
    """One row an adapter, with its folder."""
    return [
        Row("adapter", f"{adapter['weight']:g} x {adapter['name_or_path']}", f"SHA-256 {adapter['sha256']}")
        for adapter in report["adapters"]
    ]


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
