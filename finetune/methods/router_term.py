"""The balance term as every method uses it: captured in the forward, added to the loss, closed at the step's end."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from finetune.errors import Problem, RunError
from finetune.files import write_json
from finetune.moe.families import MoeLayout
from finetune.moe.router import RouterRecord, StepBalance, capture, find_routers, load_summary

STATE_FILE = "router_balance.json"


class RouterTerm:
    """One model's routers, their balance over the optimizer steps, and the recipe's coefficient."""

    def __init__(self, model: Any, moe: MoeLayout, coefficient: float) -> None:
        self.coefficient = coefficient
        self.routers = find_routers(model, moe.router_module)
        router: Any = self.routers[0]
        self.balance = StepBalance(
            len(self.routers), router.num_experts, router.top_k, next(router.parameters()).device
        )
        self.share_LE: torch.Tensor | None = None  # load of the last step, each layer's row sums to 1

    def capture(self) -> AbstractContextManager[RouterRecord]:
        """Record the routers of the forward that runs in the block."""
        return capture(self.routers)

    def add(self, loss: torch.Tensor, record: RouterRecord, real_T: torch.Tensor, ranks: int) -> torch.Tensor:
        """`loss` plus this micro-batch's share of the weighted term; `ranks` undoes the averaging of gradients.

        With a coefficient of 0 the loss is returned as it is, bit for bit.
        """
        term = self.balance.term(record, real_T)
        return loss + self.coefficient * ranks * term if self.coefficient else loss

    def end_step(self, all_reduce: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Close the optimizer step; returns the exact, unweighted value over all of its tokens."""
        value, self.share_LE = self.balance.end_step(all_reduce)
        return value

    def metrics(self) -> dict[str, float]:
        """Load figures of the last step."""
        return {} if self.share_LE is None else load_summary(self.share_LE)

    def save(self, folder: Path) -> None:
        """Write the state that a resumed run needs."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / STATE_FILE, self.balance.state_dict())

    def load(self, folder: Path) -> None:
        """Continue from `save`; raises RunError where the checkpoint lacks it."""
        path = folder / STATE_FILE
        if not path.is_file():
            raise RunError(Problem(str(path), "the checkpoint has no router state", "start anew in another output_dir"))
        self.balance.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
