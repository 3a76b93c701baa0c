"""The prepared data of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.data import DataStats


@dataclass(frozen=True)
class MethodRows:
    """`train` and `eval` (None: no evaluation) as the trainer takes them, `collator` makes its batches.

    `conversations` with `conversation_collator`: the same rows one conversation each, for measurements before
    there is an adapter. `remarks`: lines for the user. `stats` by split.
    """

    train: Any
    eval: Any
    collator: Any
    stats: dict[str, DataStats]
    conversations: Any
    conversation_collator: Any
    remarks: Sequence[str] = field(default=())

    def counts(self) -> dict[str, dict[str, Any]]:
        """What the audit and the adapter's record say about the rows of each split."""
        return {split: stats.as_dict() for split, stats in self.stats.items()}
