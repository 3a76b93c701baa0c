"""The rows and the recipe that the runs of whole commands share."""

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
