"""Runs of a tiny model that faults happen to, and what an undisturbed one of them leaves."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.end_to_end.workspaces import write_workspace
from tests.equivalence.dpo_runs import write_pairs
from tests.families import save_tiny
from tests.faults.harness import Commands, Ended, Running, assert_same_files, files_of, succeed

STEPS = 6
SAVED = (4, 6)
"""The checkpoints that are left at the end: the newest two, with the best of steps 4 and 6 among them."""
PAIR_COUNT = 20
OF_THE_MOMENT = ("times.jsonl", "provenance.json", ".lock")
"""What says when and where a run took place; everything else is the same in every run of the recipe."""
TRAIN = ("train", "recipe.yaml")
SOURCE = {"path": "rows.jsonl", "format": "prompt_completion"}
PAIRS = {"path": "pairs.jsonl", "format": "preference"}
SECTIONS: dict[str, Any] = {
    "output_dir": "run",
    "model": {"name_or_path": "base", "load_in_4bit": True, "dtype": "float32"},
    # The balance of the step before, and the correction biases each have a state that a continued run needs.
    "lora": {"targets": ["attention", "experts"], "r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
    "router": {"router_aux_loss_coef": 0.02, "scope": "step", "bias_update_rate": 0.02},
    "data": {"train": dict(SOURCE), "eval": dict(SOURCE), "max_length": 64},
    "training": {
        "max_steps": STEPS,
        "learning_rate": 0.01,
        "global_batch_size": 4,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "eval_steps": 4,
        "logging_steps": 1,
        "gradient_checkpointing": "none",
    },
}
DPO = {
    "method": {"kind": "dpo", "beta": 0.5, "reference": "precomputed"},
    "data": {"train": dict(PAIRS), "eval": dict(PAIRS), "max_length": 64},
}


@dataclass(frozen=True)
class Run:
    """A recipe in a folder, as `folder/recipe.yaml`, that commands train."""

    commands: Commands
    folder: Path

    def copied_to(self, folder: Path) -> "Run":
        """The same recipe, without anything of its run, in another folder."""
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("run", "cache"), dirs_exist_ok=True)
        return Run(self.commands, folder)

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    def start(self, *overrides: str) -> Running:
        """The command of the run, always the same one."""
        environment = {"FINETUNE_CACHE": str(self.folder / "cache"), "ACCELERATE_USE_CPU": "true"}
        return self.commands.start(self.folder, *TRAIN, *overrides, **environment)

    def finish(self, *overrides: str) -> Ended:
        """The command once more, to its end."""
        return succeed(self.start(*overrides).wait())

    def files(self) -> dict[str, bytes]:
        """What the run has left, without what was set aside."""
        kept = files_of(self.path, OF_THE_MOMENT)
        return {name: content for name, content in kept.items() if not name.startswith("set-aside/")}

    def checkpoints(self) -> list[int]:
        """The steps of its checkpoints."""
        return sorted(int(path.name.rpartition("-")[2]) for path in self.path.glob("checkpoint-*"))

    def steps_logged(self) -> int:
        """The last step in its metrics, 0 without one."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return max((json.loads(line)["step"] for line in lines), default=0)


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to: its files, and its seconds."""

    run: Run
    files: dict[str, bytes]
    seconds: float

    def assert_same(self, other: Run, how: str) -> None:
        """Every file of the other run has the same bytes, and nothing is left beside them."""
        assert_same_files(other.files(), self.files, how)


def make_run(commands: Commands, folder: Path, **sections: Any) -> Run:
    """A recipe on a tiny DeepSeek-V3, with rows and pairs."""
    save_tiny("deepseek_v3", folder / "base")
    write_workspace(folder, **{**SECTIONS, **sections})
    write_pairs(folder / "pairs.jsonl", PAIR_COUNT)
    return Run(commands, folder)


def undisturbed(run: Run, folder: Path) -> Undisturbed:
    """Two runs: the first one imports what the others then find. Both leave the same bytes."""
    first, second = run.copied_to(folder / "first"), run.copied_to(folder / "second")
    first.finish()
    seconds = second.finish().seconds
    assert_same_files(first.files(), second.files(), "two undisturbed runs")
    assert first.checkpoints() == list(SAVED)
    return Undisturbed(second, second.files(), seconds)
