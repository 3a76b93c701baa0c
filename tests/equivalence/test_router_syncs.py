"""What waits for the device in a step: nothing of the router's code between logged lines; one read stops a bad step.

On a GPU a host that reads a value waits for all work before it. Here, without one, the reads themselves are counted,
by the line of this program that makes them.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import finetune
from tests.equivalence.sft_runs import recipe, trainer_for, write_rows

PACKAGE = Path(finetune.__file__).parent
READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__", "equal"}
SIZED_BY_VALUES = {"nonzero", "masked_select", "unique", "bincount", "argwhere", "allclose"}


class Reads(TorchFunctionMode):
    """Counts reads of tensor values made by this program, by file and function."""

    def __init__(self) -> None:
        super().__init__()
        self.by_function: Counter[str] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # The device of this run is itself the CPU: what goes to the device is no read.
        to_host = name == "to" and "cpu" in [
            each for each in (*args[1:], kwargs.get("device")) if isinstance(each, str)
        ]
        by_mask = name == "__getitem__" and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool
        if name in READS | SIZED_BY_VALUES or to_host or by_mask:
            caller = sys._getframe(1)
            while caller.f_code.co_name == "__torch_function__" and caller.f_back is not None:
                caller = caller.f_back  # through the mode that keeps the routing for the recompute
            path = Path(caller.f_code.co_filename)
            if path.is_relative_to(PACKAGE):
                self.by_function[f"{path.relative_to(PACKAGE)}:{caller.f_code.co_name}"] += 1
        return func(*args, **kwargs)


def reads_of(settings: Any) -> dict[str, int]:
    trainer, _ = trainer_for(settings)
    with Reads() as reads:
        trainer.train()
    return {where: count for where, count in reads.by_function.items() if not where.startswith("moe/expert")}


@pytest.mark.parametrize("logging_steps", [3, 1])
def test_the_router_is_read_when_a_line_is_logged_and_never_else(
    base: Path, tmp_path: Path, logging_steps: int
) -> None:
    """Three steps of four micro-batches, with balance, z-loss and a trained router that is held against the base's."""
    rows = write_rows(tmp_path / "rows.jsonl")
    router = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01}
    settings = recipe(
        base,
        rows,
        tmp_path / "run",
        router,
        per_device_train_batch_size=2,
        logging_steps=logging_steps,
        gradient_checkpointing="selective",
    )
    lines = 3 // logging_steps
    assert reads_of(settings) == {
        "methods/steps.py:_clip_grad_norm": 3,  # once a step: is every loss and the gradient finite
        "methods/steps.py:_over_ranks": lines,
        "methods/router_term.py:figures": lines,
    }
