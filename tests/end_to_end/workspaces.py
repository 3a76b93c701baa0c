"""The rows and the recipe that the runs of whole commands share, and what two runs of one recipe have in common."""

import json
from pathlib import Path
from typing import Any

import yaml


def write_workspace(folder: Path, **sections: Any) -> None:
    """34 rows (not a multiple of any batch) of several lengths, and a recipe of four steps with these sections."""
    rows = [{"prompt": "light " * (1 + i % 7), "completion": "on " * (1 + i % 3)} for i in range(34)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "method": {"kind": "sft"},
        "training": {
            "max_steps": 4,
            "learning_rate": 0.01,
            "global_batch_size": 8,
            "per_device_train_batch_size": 4,
            "save_steps": 2,
        },
        "logging": {"report_to": "none"},
        **sections,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


OF_THE_MOMENT = (".lock", "provenance.json", "times.jsonl")
"""Files of a run that hold times, the command line, or the process."""


def written(run: Path) -> dict[str, bytes]:
    """Every file of a run that two undisturbed runs of one recipe write alike, by its path below the run's folder."""
    files = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    recipe = [line for line in files["recipe.yaml"].splitlines() if not line.startswith(b"output_dir:")]
    files["recipe.yaml"] = b"\n".join(recipe)
    return {name: value for name, value in files.items() if name not in OF_THE_MOMENT}


def differing(run: Path, other: Path) -> list[str]:
    """Files that only one of two runs has, or that differ."""
    ours, theirs = written(run), written(other)
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
