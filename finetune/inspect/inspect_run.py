"""Describe a run folder: its recipe, its progress and its files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.checkpoint.reader import read_json
from finetune.inspect.lines import Line, figures, named, reading, recipe_lines
from finetune.recipe import load_recipe
from finetune.run import RunFolder, read_metrics
from finetune.run.checkpoints import best_of, checkpoints, whole_checkpoints

Checkpoints = Mapping[int, Path]
"""Whole checkpoints by step."""
_PACKAGES = ("torch", "transformers", "peft", "trl")
_SHOWN = ("step", "loss", "eval_loss", "balance_loss", "rewards/margins", "rewards/accuracies")


def run_lines(folder: Path) -> list[Line]:
    """What `finetune inspect` says of a run."""
    run = RunFolder(folder)
    whole = dict(whole_checkpoints(folder))
    lines: list[Line] = [("what", f"run, {_state(run, whole)}")]
    if run.provenance.is_file():
        lines += _provenance(run)
    if run.recipe.is_file():
        lines += recipe_lines(load_recipe(run.recipe).model_dump(mode="json"))
    if run.audit.is_file():
        lines += _parts(run)
    logged = read_metrics(run.metrics) if run.metrics.is_file() else []
    for name, key in (("last train", "loss"), ("last eval", "eval_loss")):
        last = next((line for line in reversed(logged) if key in line), None)
        if last is not None:
            lines.append((name, figures({metric: last[metric] for metric in _SHOWN if metric in last})))
    return [*lines, *_checkpoints(run, whole, logged), ("merge", _merge(run, whole))]


def _provenance(run: RunFolder) -> list[Line]:
    provenance = read_json(run.provenance)
    with reading(run.provenance, "a run"):
        git, versions = provenance.get("git") or {}, provenance.get("packages") or {}
        commit = f", commit {git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else ""
        packages = ", ".join(f"{name} {versions[name]}" for name in _PACKAGES if name in versions)
        started = f"{provenance.get('started') or 'start time not recorded'}{commit}"
        base = named(provenance["base"]) if provenance.get("base") else "not recorded"
        return [("started", f"{started}; {packages or 'packages not recorded'}"), ("base", base)]


def _state(run: RunFolder, whole: Checkpoints) -> str:
    if run.adapter.is_dir():
        return "finished"
    return f"not finished; it can continue from step {max(whole)}" if whole else "not finished, without a checkpoint"


def _checkpoints(run: RunFolder, whole: Checkpoints, logged: Sequence[dict[str, Any]]) -> list[Line]:
    """The checkpoints that can be named, those that are damaged, and the best one with its evaluation."""
    present = checkpoints(run.path)
    if not present:
        return []
    damaged = [folder.name for step, folder in present.items() if step not in whole]
    names = ", ".join(f"checkpoint-{step}" for step in sorted(whole)) or "none is whole"
    lines = [("checkpoints", names + (f"; damaged: {', '.join(damaged)}" if damaged else ""))]
    if whole and max(whole) != max(present):
        return [*lines, ("best", f"not known: {present[max(present)].name}, the newest, is damaged")]
    best = best_of(whole[max(whole)]) if whole else None
    if best is None:
        return [*lines, ("best", "not known: nothing was evaluated" if whole else "not known")]
    evaluated = next((line for line in logged if line["step"] == best.step and "eval_loss" in line), {})
    shown = figures({metric: evaluated[metric] for metric in _SHOWN if metric in evaluated and metric != "loss"})
    return [*lines, ("best", f"{shown or f'step {best.step}'}: {run.path}@best")]


def _parts(run: RunFolder) -> list[Line]:
    """The parts of the model that it has."""
    audit = read_json(run.audit)
    with reading(run.audit, "a run"):
        return [(f"  {part['part']}", _part(part)) for part in audit["parts"] if part["parameters"]]


def _part(part: dict[str, Any]) -> str:
    stored = ", ".join(f"{count} {kind}" for kind, count in part["stored_as"].items())
    return f"{stored}; adapted {part['adapted']} of {part['adaptable']}; {part['trained']:,} trained"


def _merge(run: RunFolder, whole: Checkpoints) -> str:
    """What to name in a merge."""
    if run.adapter.is_dir():
        return f"finetune merge {run.path}; see finetune inspect {run.adapter}"
    return f"finetune merge {whole[max(whole)]}" if whole else "there is no adapter yet"
