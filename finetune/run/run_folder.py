"""The run folder (`output_dir`): its paths, and what may lie in it before a run starts."""

import itertools
from pathlib import Path

from finetune.errors import Problem, RunError

# Files of a run that may lie there without its recipe, which is the first one to be written.
_WITHOUT_RECIPE = {"audit.json", "experts.json", "identity.json", "provenance.json", "reference"}


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

    @property
    def times(self) -> Path:
        """Times and rates of each logged step: what differs between two runs of one recipe."""
        return self.path / "times.jsonl"

    @property
    def identity(self) -> Path:
        """The run's identity, which its checkpoints carry, JSON."""
        return self.path / "identity.json"

    @property
    def noticed(self) -> Path:
        """Steps that the watchdog noticed, with their rows."""
        return self.path / "noticed.jsonl"

    @property
    def has_begun(self) -> bool:
        """Whether a run in this folder has come as far as its first step."""
        return self.adapter.is_dir() or self.metrics.is_file() or any(self.path.glob("checkpoint-*"))

    def check_contents(self) -> None:
        """Raise RunError where `output_dir` is a file, or holds files that no run has written."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(Problem(str(self.path), "output_dir is a file", "name a folder"))
        if not self.path.exists() or self.recipe.is_file():
            return
        names = {entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")}
        if foreign := sorted(names - _WITHOUT_RECIPE):
            what, do = "output_dir holds files that are not a run's", "choose another output_dir"
            raise RunError(Problem(str(self.path), what, do, got=", ".join(foreign[:5])))


def keep_aside(path: Path) -> Path | None:
    """Rename what lies at `path` to the next free `path.1`, `path.2` ...; None where nothing lies there."""
    if not path.exists():
        return None
    free = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    kept = next(candidate for candidate in free if not candidate.exists())
    path.rename(kept)
    return kept
