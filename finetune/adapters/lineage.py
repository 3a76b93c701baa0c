"""Check that adapters belong to a base: trained on it, or on what the adapters before them make of it.

An adapter records the fingerprint of the base that it was trained on. If that base was a merged checkpoint, the record
also holds its own base and adapters (`base.made_from`), so that a chain of adapters can be followed (SFT, then DPO on
the merged model).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.adapters.adapter import Adapter
from finetune.adapters.record import RECORD_FILE, MergeSources, read_record
from finetune.checkpoint import differing_settings
from finetune.checkpoint.reader import read_json
from finetune.errors import Problem, WeightsError
from finetune.model_files import reading

REPORT_FILE = "merge-report.json"
_NO_REPORT = "does not have the fields that a merge writes"


@dataclass(frozen=True)
class Weighted:
    """One of the adapters of a merge, `weight` times; `digest` is the SHA-256 of its weights."""

    adapter: Adapter
    weight: float
    digest: str


def made_from(base: Path, fingerprint: str) -> dict[str, Any] | None:
    """What a merged checkpoint in `base` was made from; None for any other. `fingerprint`: of that checkpoint.

    A report whose fingerprint is another one is not of these weights, and says nothing.
    """
    if not (base / REPORT_FILE).is_file():
        return None
    report = read_json(base / REPORT_FILE)
    if report.get("fingerprint") != fingerprint:
        return None
    with reading(base / REPORT_FILE, _NO_REPORT):
        adapters = [{"sha256": adapter["sha256"], "weight": adapter["weight"]} for adapter in report["adapters"]]
        found = {"base_fingerprint": report["base_fingerprint"], "into": report["into"], "adapters": adapters}
        return MergeSources.model_validate(found).model_dump()


@dataclass(frozen=True)
class TrainedTemplate:
    """What the chat template of a merged checkpoint was given in training: the date that it wrote, and variables."""

    day: str | None
    args: Mapping[str, Any]


def trained_template(checkpoint: Path) -> TrainedTemplate | None:
    """That of an adapter, or of the last adapter of a merged checkpoint, whose template it has; None for others."""
    if (checkpoint / RECORD_FILE).is_file():
        record = read_record(checkpoint)
        return TrainedTemplate(record.template_day, record.template_args or {})
    if not (checkpoint / REPORT_FILE).is_file():
        return None
    report = read_json(checkpoint / REPORT_FILE)
    with reading(checkpoint / REPORT_FILE, _NO_REPORT):
        adapters = report["adapters"]
        days = [adapter.get("template_day") for adapter in adapters]
        args = (adapters[-1].get("template_args") if adapters else None) or {}
        day = next((day for day in reversed(days) if day), None)
        if not isinstance(args, dict) or not isinstance(day, str | None):
            raise TypeError("template_args or template_day")
        return TrainedTemplate(day, args)


def check_related(base: Path, fingerprint: str, config: Mapping[str, Any], adapters: Sequence[Weighted]) -> None:
    """Raise WeightsError unless each adapter was trained on this base, or on what the ones before it make of it.

    `fingerprint` and `config` (`forward_settings`) are the base's. An adapter that records no base is accepted.
    """
    problems = []
    given = {weighted.digest: weighted.adapter.folder for weighted in adapters}
    for number, weighted in enumerate(adapters):
        if weighted.adapter.initial_digest in given:
            what = "continues another of the adapters and already contains its change"
            got = str(given[str(weighted.adapter.initial_digest)])
            problems.append(Problem(str(weighted.adapter.folder), what, "name only the later one", got))
        recorded = weighted.adapter.base_fingerprint
        trained_on = weighted.adapter.record.base
        if trained_on is not None and (changed := differing_settings(trained_on.config, config)):
            what = "the base's config.json decides another forward than in the adapter's training"
            do = "give the base that the adapter was trained on with --base, or put its config.json back"
            problems.append(Problem(str(base / "config.json"), what, do, "; ".join(changed)))
        if recorded in (None, fingerprint):
            continue
        before = adapters[:number]
        if weighted.adapter.base_made_from is None:
            do = "give the base that the adapter was trained on with --base"
            got = f"{fingerprint[:12]} where the adapter records {str(recorded)[:12]}"
            problems.append(Problem(str(base), "base fingerprint differs", do, got))
        elif problem := _chain_problem(weighted.adapter, weighted.adapter.base_made_from, fingerprint, before):
            problems.append(problem)
    if problems:
        raise WeightsError(problems)


def _chain_problem(
    adapter: Adapter, source: MergeSources, fingerprint: str, before: Sequence[Weighted]
) -> Problem | None:
    """What is wrong with an adapter that was trained on a merged checkpoint, given the ones before it."""
    trained_on = [(merged.sha256, merged.weight) for merged in source.adapters]
    where = str(adapter.folder)
    if source.base_fingerprint != fingerprint:
        what = "was trained on a checkpoint that was merged from another base"
        got = f"{fingerprint[:12]} where the record says {source.base_fingerprint[:12]}"
        return Problem(where, what, "give that base with --base, or the merged checkpoint itself", got)
    if trained_on != [(weighted.digest, weighted.weight) for weighted in before]:
        names = ", ".join(f"{digest[:12]} x {weight:g}" for digest, weight in trained_on)
        given = ", ".join(f"{weighted.digest[:12]} x {weighted.weight:g}" for weighted in before) or "none"
        what = f"was trained on a checkpoint with these adapters merged in: {names}"
        return Problem(where, what, "name just these before it, in this order and with these weights", given)
    return None
