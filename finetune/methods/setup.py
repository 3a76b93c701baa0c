"""What every trainer is made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.methods.router_term import RouterTerm
from finetune.methods.rows import MethodRows
from finetune.methods.steps import RouterObserver
from finetune.moe.earlier import EarlierAdapter
from finetune.recipe import Recipe
from finetune.run import RunFolder


@dataclass(frozen=True)
class TrainerSetup:
    """`earlier`: the adapter that the run goes on from; `base`: name and fingerprint of the base checkpoint."""

    recipe: Recipe
    run: RunFolder
    model: Any
    tokenizer: Any
    rows: MethodRows
    router_term: RouterTerm | None
    earlier: EarlierAdapter | None
    base: Mapping[str, str]
    dashboard_args: Mapping[str, Any]
    callbacks: Sequence[Any]
    router_observers: Sequence[RouterObserver]

    def arguments(self) -> dict[str, Any]:
        """The arguments that all trainers take."""
        return {
            "model": self.model,
            "router_term": self.router_term,
            "processing_class": self.tokenizer,
            "data_collator": self.rows.collator,
            "train_dataset": self.rows.train,
            "eval_dataset": self.rows.eval,
            "callbacks": list(self.callbacks),
            "router_observers": self.router_observers,
        }
