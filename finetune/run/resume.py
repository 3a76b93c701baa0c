"""Whether a run starts, continues or is finished, and what has changed since it began.

A run continues with the recipe, the base and the rows that it began with. What has changed is shown, and stops it,
unless the user allows that change.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError, Problem, RecipeError, RunError
from finetune.files import read_json, write_json
from finetune.recipe import Recipe, load_recipe
from finetune.recipe.schema import settings
from finetune.run.checkpoints import (
    IDENTITY_FILE,
    SET_ASIDE,
    check_whole,
    checkpoints,
    read_trainer_state,
    remove_leftovers,
    set_aside,
)
from finetune.run.run_folder import RunFolder, keep_aside
from finetune.run.run_lock import lock_run, unlock_run

AUTO, NEVER = "auto", "never"

_BATCH_SIZE = "training.per_device_train_batch_size"  # with router.scope micro_batch the balance term depends on it
FREE = (
    "output_dir",
    "logging",
    "save",
    "watchdog",
    "training.resume",
    "training.rank_timeout",
    "training.save_steps",
    "training.eval_steps",
    "training.logging_steps",
    _BATCH_SIZE,
    "training.gradient_checkpointing",
)
"""Settings that do not change the result, or (the watchdog's) only steps to come: output, logging, saving, and how a
step is split into micro-batches."""

FIXED = (
    "lora",
    "method.kind",
    "training.optim",
    "model.adapter",
    "model.load_in_4bit",
    "model.added_tokens",
    "router.bias_update_rate",
)
"""Settings that decide which tensors a checkpoint holds."""


@dataclass(frozen=True)
class Change:
    """A setting, or a part of the input, that is not as it was when the run began; `key` is its key in the recipe."""

    key: str
    before: str
    now: str


def recipe_changes(before: Recipe, now: Recipe) -> list[Change]:
    """Settings that decide the result and differ."""
    old, new = (_deciding(recipe) for recipe in (before, now))
    return [Change(key, repr(old.get(key)), repr(new.get(key))) for key in old | new if old.get(key) != new.get(key)]


def _deciding(recipe: Recipe) -> dict[str, Any]:
    flat = _flat(recipe.model_dump(mode="json"))
    free = FREE if flat.get("router.scope") != "micro_batch" else tuple(set(FREE) - {_BATCH_SIZE})
    return {key: value for key, value in flat.items() if not any(is_part(key, name) for name in free)}


def is_part(key: str, section: str) -> bool:
    """Whether `key` is `section` or below it."""
    return key == section or key.startswith((f"{section}.", f"{section}["))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf for name, inner in value.items() for key, leaf in _flat(inner, f"{prefix}.{name}".lstrip(".")).items()
    }


def row_changes(run: RunFolder, rows: Mapping[str, Any]) -> list[Change]:
    """Data sets whose rows differ from those that the run began with; `rows`: counts of each split, as in the audit."""
    before = _recorded(run).rows
    changes = []
    for split in sorted(rows.keys() & before.keys()):
        then, now = before[split], _named_digests(rows[split]["sets"])
        if then != now:
            names = [str(name) for name, digest in now if (name, digest) not in then] or [str(name) for name, _ in then]
            changes.append(Change(f"data.{split}", "other rows", f"other rows of {', '.join(names)}"))
    return changes


def recorded_template_day(run: RunFolder) -> str | None:
    """The date that the chat template wrote when the run began; None where it writes none, or before it is known."""
    return _recorded(run).template_day


@dataclass(frozen=True)
class _Recorded:
    """What is recorded of a run's rows: names and digests by split, and the date that the template wrote."""

    rows: Mapping[str, list[tuple[str, str]]]
    template_day: str | None = None


def _recorded(run: RunFolder) -> _Recorded:
    """From the audit; where it is damaged, from the newest checkpoint, which says the same."""
    audit = _read(run.audit)
    if isinstance(audit.get("rows"), dict):
        rows = {split: _named_digests(counts["sets"]) for split, counts in audit["rows"].items()}
        return _Recorded(rows, audit.get("template_day"))
    for folder in reversed(checkpoints(run.path).values()):
        record = _read(folder / "finetune.json")
        if isinstance(record.get("data"), dict):
            rows = {split: _named_digests(sets) for split, sets in record["data"].items()}
            return _Recorded(rows, record.get("template_day"))
    return _Recorded({})


def _named_digests(sets: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [(str(one.get("name")), str(one.get("digest"))) for one in sets]


def check_allowed(run: RunFolder, changes: Iterable[Change], allowed: Sequence[str]) -> list[str]:
    """Lines about changes that the user allows. Raises RunError with all others."""
    problems, lines = [], []
    for change in changes:
        what = f"the run in {run.path} began with {change.before}"
        if any(is_part(change.key, name) for name in FIXED):
            do = "set it back to continue that run, or name another output_dir: no checkpoint fits this change"
            problems.append(Problem(change.key, what, do, got=change.now))
        elif not any(is_part(change.key, name) for name in allowed):
            do = f"set it back to continue that run, add --allow-change {change.key} to continue with the change, "
            problems.append(Problem(change.key, what, do + "or name another output_dir", got=change.now))
        else:
            lines.append(f"{change.key}: {change.before} became {change.now}, which --allow-change allows")
    if problems:
        raise RunError(problems)
    return lines


def check_keys(allowed: Sequence[str]) -> None:
    """Raise RunError for keys of `--allow-change` that no recipe has."""
    known = settings()
    if unknown := [key for key in allowed if key.partition("[")[0] not in known]:
        do = "write a key of the recipe, such as training.max_steps or data.train"
        raise RunError([Problem("--allow-change", "no recipe has this key", do, got=key) for key in unknown])


def identity_of(recipe: Recipe, base: Mapping[str, Any], rows: Mapping[str, Any], adapter: str | None) -> str:
    """SHA-256 of what decides a run's result, and not of where or when it runs.

    `base`: its record; `rows` as in `row_changes`; `adapter`: digest of the weights that it starts from.
    """
    digests = {split: [one.get("digest") for one in counts["sets"]] for split, counts in rows.items()}
    places = ("model.name_or_path", "model.adapter")
    deciding = {key: value for key, value in _deciding(recipe).items() if key not in places}
    parts = [deciding, base.get("fingerprint"), base.get("config"), digests, adapter]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Identity:
    """`now`: the run's identity, which its checkpoints carry. `earlier`: those before changes that were allowed."""

    now: str
    earlier: tuple[str, ...] = ()

    @classmethod
    def read(cls, run: RunFolder) -> "Identity | None":
        """As recorded when the run began; None where nothing is recorded."""
        value = _read(run.identity)
        if not isinstance(value.get("identity"), str):
            return None
        return cls(value["identity"], tuple(map(str, value.get("earlier", []))))

    def changed(self, now: str) -> "Identity":
        """After a change that was allowed."""
        return Identity(now, (*self.earlier, self.now)) if now != self.now else self

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"identity": self.now, "earlier": list(self.earlier)}


def _read(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def earlier_recipe(run: RunFolder) -> Recipe | None:
    """The recipe of the run that the folder holds; None where no run has come as far as its first step.

    Raises RunError where the folder holds anything else.
    """
    run.check_contents()
    if not (run.recipe.is_file() and run.has_begun):
        return None
    try:
        return load_recipe(run.recipe)
    except RecipeError as error:
        if (saved := _saved_recipe(run)) is not None:
            return saved
        do = "put it back, or write training.resume: never, which keeps this run aside and starts anew"
        what = "the run's own record of its recipe cannot be read"
        raise RunError(Problem(str(run.recipe), what, do, got=_first(error))) from error


def _saved_recipe(run: RunFolder) -> Recipe | None:
    """The recipe as the newest checkpoint has it, for a run whose own record is damaged."""
    for folder in reversed(checkpoints(run.path).values()):
        recipe = _read(folder / "finetune.json").get("recipe")
        if isinstance(recipe, dict):
            with suppress(ValueError):
                return Recipe.model_validate({**recipe, "output_dir": str(run.path)})
    return None


@dataclass(frozen=True)
class Begun:
    """How a run goes on: from `checkpoint`, None for its first step; `lines` for the user."""

    identity: str
    checkpoint: Path | None = None
    is_finished: bool = False
    lines: Sequence[str] = ()


def begin_anew(run: RunFolder, identity: str) -> Begun:
    """Make the run folder ready, with the lock held, for a run at its first step. An earlier run is kept aside."""
    lines = []
    if run.has_begun:
        kept = keep_aside(run.path.resolve())
        unlock_run(run.path)  # the lock has moved with the folder
        lock_run(run.path)
        lines.append(f"the earlier run in {run.path} is kept as {kept}")
    remove_leftovers(run.path)
    before = Identity.read(run)
    if before is None or before.now != identity:
        run.experts.unlink(missing_ok=True)
        shutil.rmtree(run.reference, ignore_errors=True)
    write_json(run.identity, Identity(identity).as_dict())
    return Begun(identity, lines=lines)


def go_on(run: RunFolder, resume: str, identity: str, changed: bool) -> Begun:
    """Make the run folder ready, with the lock held, to continue the run in it. `resume` as in `choose_checkpoint`.

    `identity`: of what the run is made from now; it counts only where a change was allowed (`changed`).
    """
    recorded = Identity.read(run) or Identity(identity)
    now = recorded.changed(identity) if changed else recorded
    if run.adapter.is_dir() and not changed and resume == AUTO:
        return Begun(now.now, is_finished=True)
    remove_leftovers(run.path)
    checkpoint, lines = choose_checkpoint(run, resume, now)
    if run.adapter.is_dir():
        lines.append(f"the finished adapter is kept as {keep_aside(run.adapter)}")
    write_json(run.identity, now.as_dict())
    if checkpoint is not None:
        lines.append(f"the run in {run.path} continues from {checkpoint.name}")
    return Begun(now.now, checkpoint, lines=lines)


def choose_checkpoint(run: RunFolder, resume: str, identity: Identity) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, None for the start of the run; and lines about those that were set aside.

    `resume`: `auto` for the newest one that is whole and of this run, or the path of one. Raises RunError where that
    path is none of them.
    """
    if resume != AUTO:
        return _named(run, Path(resume), identity)
    lines = []
    for step, folder in reversed(checkpoints(run.path).items()):
        try:
            _check(folder, step, identity)
        except (FinetuneError, OSError) as error:
            kept = set_aside(run.path, folder)
            lines.append(f"{folder.name} cannot be continued from and is kept as {kept}: {_first(error)}")
            continue
        return folder, lines
    if lines:
        lines.append("no whole checkpoint is left: the run starts again at its first step")
    return None, lines


def _named(run: RunFolder, path: Path, identity: Identity) -> tuple[Path, list[str]]:
    ours = {folder.resolve(): (step, folder) for step, folder in checkpoints(run.path).items()}
    if path.resolve() not in ours:
        what, do = "not a checkpoint of the run in output_dir", f"name a folder checkpoint-N of {run.path}, or auto"
        raise RunError(Problem("training.resume", what, do, got=str(path)))
    step, folder = ours[path.resolve()]
    _check(folder, step, identity)
    later = [other for at, other in checkpoints(run.path).items() if at > step]
    kept = [set_aside(run.path, other) for other in later]
    names = ", ".join(path.name for path in kept)
    return folder, [f"later checkpoints are kept in {run.path / SET_ASIDE}: {names}"] if kept else []


def _check(folder: Path, step: int, identity: Identity) -> None:
    check_whole(folder)
    do = "continue from another checkpoint of the run"
    if (found := read_trainer_state(folder)["global_step"]) != step:
        raise RunError(Problem(str(folder), "its state is of another step than its name says", do, got=str(found)))
    if recorded_identity(folder) not in (identity.now, *identity.earlier):
        what = "a checkpoint of another run: another recipe, base or rows"
        raise RunError(Problem(str(folder), what, do))


def recorded_identity(folder: Path) -> str | None:
    """The identity that a checkpoint carries."""
    value = _read(folder / IDENTITY_FILE).get("identity")
    return value if isinstance(value, str) else None


def _first(error: FinetuneError | OSError) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
