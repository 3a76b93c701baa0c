"""What all methods share: the prepared rows, the set-up of a trainer, and the audit of what it has prepared."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from finetune.adapters.initial import InitialAdapter
from finetune.base import Base
from finetune.data import DataStats
from finetune.errors import Problem, RunError
from finetune.methods.router_term import RouterTerm
from finetune.methods.sharded_optimizer import stepped_parameters
from finetune.methods.watchdog import Watchdog
from finetune.moe.audit import audit_model, check_audit
from finetune.moe.esft import ExpertChoice
from finetune.moe.families import Family
from finetune.recipe import Recipe
from finetune.run import Dashboards, MetricsCallback, RouterLoadCallback, RunFolder


class PreparedAudit(TrainerCallback):  # type: ignore[misc]
    """Repeats the audit on the model that is trained, after accelerate has prepared it, and looks at the optimizer."""

    def __init__(self, family: Family, recipe: Recipe) -> None:
        self.family, self.recipe = family, recipe

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
        """Raises RunError where the prepared model differs from the recipe, or the optimizer misses parameters."""
        check_audit(audit_model(model, self.family), self.recipe)
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        stepped = {id(parameter) for parameter in stepped_parameters(optimizer)}
        if trained != stepped:
            what = f"{len(trained)} tensors are to be trained and the optimizer has other ones"
            got = f"{len(stepped)} in the optimizer, {len(trained & stepped)} of them trained"
            raise RunError(Problem("audit", what, "report this: the launcher has replaced parameters", got))


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


@dataclass(frozen=True)
class TrainerSetup:
    """`initial_adapter`: the adapter that training starts from, if it is not a fresh one; `choice`: the experts that
    are adapted, if not all; `identity`: of the run, for its checkpoints; `checkpoint`: the one to continue from."""

    recipe: Recipe
    run: RunFolder
    base: Base
    model: Any
    rows: MethodRows
    initial_adapter: InitialAdapter | None
    dashboards: Dashboards
    choice: ExpertChoice | None = None
    identity: str = ""
    checkpoint: Path | None = None

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
            "setup": self,
            "model": self.model,
            "router_term": self.router_term,
            "watchdog": Watchdog(self.recipe.watchdog, self.run.path),
            "processing_class": self.base.tokenizer,
            "data_collator": self.rows.collator,
            "train_dataset": self.rows.train,
            "eval_dataset": self.rows.eval,
            "callbacks": [
                PreparedAudit(self.base.family, self.recipe),
                MetricsCallback(self.run.metrics),
                router_load,
                *self.dashboards.callbacks,
            ],
            "router_observers": [
                router_load.show_router,
                *(callback.show_router for callback in self.dashboards.callbacks),
            ],
        }
