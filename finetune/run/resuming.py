"""Checks that a resumed run has the recipe and the rows that it started with."""

import json
from collections.abc import Mapping
from typing import Any

from finetune.errors import Problem, RunError
from finetune.recipe import Recipe, load_recipe
from finetune.run.folder import RunFolder

_BATCH_SIZE = "training.per_device_train_batch_size"  # with router.scope micro_batch the balance term depends on it
# Settings that do not change the result: output, logging, saving, and how a step is split into micro-batches.
_FREE = (
    "output_dir",
    "logging",
    "training.resume_from_checkpoint",
    "training.save_steps",
    "training.eval_steps",
    "training.logging_steps",
    _BATCH_SIZE,
    "training.gradient_checkpointing",
)


def check_same_recipe(run: RunFolder, recipe: Recipe) -> None:
    """Raise RunError with every setting in which `recipe` differs from the recipe of the run in this folder.

    Optimizer and schedule come from the checkpoint: a changed learning rate would be recorded but not used.
    """
    before, now = (_flat(settings.model_dump(mode="json")) for settings in (load_recipe(run.recipe), recipe))
    free = _FREE if now.get("router.scope") != "micro_batch" else tuple(set(_FREE) - {_BATCH_SIZE})
    changed = [key for key in before | now if before.get(key) != now.get(key) and not key.startswith(free)]
    if changed:
        raise RunError(
            [
                Problem(
                    key,
                    f"the run in {run.path} was made with {before.get(key)!r}",
                    "set it back to continue that run, or name another output_dir",
                    got=repr(now.get(key)),
                )
                for key in changed
            ]
        )


def check_same_rows(run: RunFolder, rows: Mapping[str, Any]) -> None:
    """Raise RunError with every data set whose rows differ from those that the run in this folder started with.

    `rows` are the counts of each split, as in the audit.
    """
    if not run.audit.exists():
        return
    before = json.loads(run.audit.read_text(encoding="utf-8"))["rows"]
    changed = [
        str(now["name"])
        for split in rows.keys() & before.keys()
        for then, now in zip(before[split]["sets"], rows[split]["sets"], strict=True)
        if then.get("digest", now["digest"]) != now["digest"]
    ]
    if changed:
        what = f"its rows are not those that the run in {run.path} began with"
        do = "put the data back as it was to continue that run, or name another output_dir"
        raise RunError([Problem(name, what, do) for name in dict.fromkeys(changed)])


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf for name, inner in value.items() for key, leaf in _flat(inner, f"{prefix}.{name}".lstrip(".")).items()
    }
