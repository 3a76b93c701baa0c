"""A run may be continued only as what it was."""

import json
from collections.abc import Mapping
from typing import Any

from finetune.errors import Problem, RunError
from finetune.recipe import Recipe, load_recipe
from finetune.run.folder import RunFolder

_CUT = "training.per_device_train_batch_size"  # with router.scope micro_batch it decides the balance term
# What may differ without changing a result: where it goes, what is shown and kept of it, how a step is cut.
_FREE = (
    "output_dir",
    "logging",
    "training.resume_from_checkpoint",
    "training.save_steps",
    "training.eval_steps",
    "training.logging_steps",
    _CUT,
    "training.gradient_checkpointing",
)


def check_same_recipe(run: RunFolder, recipe: Recipe) -> None:
    """Raise RunError with every setting in which `recipe` is not the one that made the run in this folder.

    Optimizer and schedule come from the checkpoint: a changed learning rate, say, would be recorded but not used.
    """
    before, now = (_flat(each.model_dump(mode="json")) for each in (load_recipe(run.recipe), recipe))
    free = _FREE if now.get("router.scope") != "micro_batch" else tuple(set(_FREE) - {_CUT})
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
    """Raise RunError with every data set whose rows are not those that the run in this folder began with.

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
