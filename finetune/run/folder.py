"""The run folder (`output_dir`): paths, and checks of what the folder already holds."""

import itertools
import json
from pathlib import Path

from finetune.errors import Problem, RunError

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
