"""The arguments of every trainer."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from finetune.adapters.initial import InitialAdapter
from finetune.base import Base
from finetune.methods.router_term import RouterTerm
from finetune.methods.rows import MethodRows
from finetune.recipe import Recipe
from finetune.run import Dashboards, MetricsCallback, RouterLoadCallback, RunFolder


@dataclass(frozen=True)
class TrainerSetup:
    """`initial_adapter`: the adapter that training starts from, if it is not a fresh one."""

    recipe: Recipe
    run: RunFolder
    base: Base
    model: Any
    rows: MethodRows
    initial_adapter: InitialAdapter | None
    dashboards: Dashboards

    @cached_property
    def router_term(self) -> RouterTerm | None:
        """The router term of a mixture of experts, None for a dense model or without the section `router`."""
        if self.base.family.moe is None or self.recipe.router is None:
            return None
        return RouterTerm(self.model, self.base.family, self.recipe.router)

    def arguments(self) -> dict[str, Any]:
        """The arguments that all trainers take."""
        router_load = RouterLoadCallback(self.run.router_load)
        return {
            "model": self.model,
            "router_term": self.router_term,
            "processing_class": self.base.tokenizer,
            "data_collator": self.rows.collator,
            "train_dataset": self.rows.train,
            "eval_dataset": self.rows.eval,
            "callbacks": [MetricsCallback(self.run.metrics), router_load, *self.dashboards.callbacks],
            "router_observers": [callback.show_router for callback in (router_load, *self.dashboards.callbacks)],
        }
