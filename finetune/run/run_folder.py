"""The run folder (`output_dir`): its paths, and checks of its contents.

A resumed run must have the recipe and the rows that it started with.
"""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import Problem, RunError
from finetune.recipe import Recipe, load_recipe

# Files written before the first step. A run that died before it may be started again in the same folder.
_BEFORE_TRAINING = {
    *("recipe.yaml", "audit.json", "experts.json", "provenance.json", "reference"),
    *("wandb", "trackio", "tensorboard"),
}
_DO = "choose another output_dir, or remove this one"
_CONTINUE = ", or set training.resume_from_checkpoint=true to continue it"


class RunFolder:
    """Paths and atomic writes below `output_dir`. With several processes only the main one creates and writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def adapter(self) -> Path:
        """The PEFT adapter folder."""
        return self.path / "adapter"

    @property
    def recipe(self) -> Path:
        """The resolved recipe, YAML."""
        return self.path / "recipe.yaml"

    @property
    def audit(self) -> Path:
        """Parameters and bytes by class, JSON."""
        return self.path / "audit.json"

    @property
    def experts(self) -> Path:
        """The choice of experts, JSON; only with `lora.experts: auto`."""
        return self.path / "experts.json"

    @property
    def reference(self) -> Path:
        """The reference's log-probabilities of every pair; only for preference tuning with a precomputed reference."""
        return self.path / "reference"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def router_load(self) -> Path:
        """Load by layer and expert, one JSON object per logged step; none for a dense model."""
        return self.path / "router_load.jsonl"

    @property
    def router_load_picture(self) -> Path:
        """The load at the first and the last logged step, PNG."""
        return self.path / "router_load.png"

    @property
    def provenance(self) -> Path:
        """Base, versions and hardware of the run, JSON."""
        return self.path / "provenance.json"

    @property
    def loss_curve(self) -> Path:
        """The loss curve, PNG."""
        return self.path / "loss_curve.png"

    def create(self, resume: bool = False) -> Path | None:
        """Make the folder. A finished run in it is moved to the next free `NAME.1`, which is returned.

        Raise RunError where it holds an unfinished run (it may still be writing) or foreign files, unless `resume`
        continues that run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(Problem(str(self.path), "output_dir is a file", "name a folder"))
        kept = None
        if resume and self.adapter.is_dir():
            do = "set training.resume_from_checkpoint=false: the next run keeps it aside"
            raise RunError(Problem(str(self.path), "the run is finished, there is nothing to continue", do))
        if resume:
            self.newest_checkpoint()
        elif self.adapter.is_dir():
            kept = keep_aside(self.path.resolve())
        elif self.path.exists():
            self._check_contents()
        self.path.mkdir(parents=True, exist_ok=True)
        return kept

    def _check_contents(self) -> None:
        names = {entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")}
        run = sorted(name for name in names if name == "metrics.jsonl" or name.startswith("checkpoint-"))
        if run:
            do = _DO + (_CONTINUE if self._checkpoints() else "")
            raise RunError(Problem(str(self.path), "output_dir holds an unfinished run", do, got=", ".join(run)))
        if foreign := sorted(names - _BEFORE_TRAINING):
            what = "output_dir holds files that are not a run's"
            raise RunError(Problem(str(self.path), what, "choose another output_dir", got=", ".join(foreign[:5])))

    def newest_checkpoint(self) -> Path:
        """The newest complete `checkpoint-N`: the trainer writes its state last, so an interrupted one lacks it."""
        if whole := self._checkpoints():
            return whole[-1]
        do = "set training.resume_from_checkpoint=false to start anew, or name the run's own output_dir"
        raise RunError(Problem(str(self.path), "there is no whole checkpoint to continue from", do))

    def _checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        numbered = [
            (int(folder.name.removeprefix("checkpoint-")), folder)
            for folder in self.path.glob("checkpoint-*")
            if folder.name.removeprefix("checkpoint-").isdecimal()
        ]
        return [folder for _, folder in sorted(numbered) if _is_json(folder / "trainer_state.json")]


def keep_aside(path: Path) -> Path | None:
    """Rename what lies at `path` to the next free `path.1`, `path.2` ...; None where nothing lies there."""
    if not path.exists():
        return None
    free = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    kept = next(candidate for candidate in free if not candidate.exists())
    path.rename(kept)
    return kept


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


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


def recorded_template_day(run: RunFolder) -> str | None:
    """The date that the chat template wrote when the run began; None where it writes none, or before it is known."""
    if not run.audit.exists():
        return None
    day: str | None = json.loads(run.audit.read_text(encoding="utf-8")).get("template_day")
    return day


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf for name, inner in value.items() for key, leaf in _flat(inner, f"{prefix}.{name}".lstrip(".")).items()
    }
