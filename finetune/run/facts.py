"""Facts about the training for the adapter's record: data, last metrics, chat template."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.run.folder import RunFolder
from finetune.run.metrics import read_metrics

# Logged values that describe the machine or the moment, not the model.
_NOT_OF_THE_MODEL = ("epoch", "time", "learning_rate", "grad_norm", "runtime", "per_second", "total_flos")


def training_facts(run: RunFolder, rows: Mapping[str, Mapping[str, Any]], template: str | None) -> dict[str, Any]:
    """For the adapter's `finetune.json`. `rows`: the counts of each split, as in the audit."""
    kept = ("name", "rows", "tokens", "supervised_tokens", "weight", "content", "digest")
    return {
        "data": {
            split: [{name: dataset[name] for name in kept} for dataset in counts["sets"]]
            for split, counts in rows.items()
        },
        "metrics": final_metrics(read_metrics(run.metrics) if run.metrics.exists() else []),
        "template_sha256": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
    }


def final_metrics(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last logged figures of training ("train") and of evaluation ("eval"), each with its step."""
    metrics = {}
    for split, loss in (("train", "loss"), ("eval", "eval_loss")):
        last = next((line for line in reversed(lines) if loss in line), None)
        if last is not None:
            metrics[split] = {name: value for name, value in last.items() if not name.endswith(_NOT_OF_THE_MODEL)}
    return metrics
