"""A check that every process makes the same forwards of a sharded model, for whoever looks for a run that hangs.

A forward of a sharded model is a collective: where one process makes one more than another, both wait for operations
that do not match, until `training.rank_timeout`. With `FINETUNE_CHECK_FORWARDS=1` the processes tell each other the
number of each forward, and what it is for, before it begins.
"""

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from finetune.errors import Problem, RunError
from finetune.progress import PROGRESS
from finetune.upstream import private

SWITCH = "FINETUNE_CHECK_FORWARDS"
SECONDS = 60
"""So much later than another a process may begin a forward."""


def check_forwards(model: torch.nn.Module, environment: Mapping[str, str] = os.environ) -> None:
    """Compare the forwards of `model` on all processes, if the environment says so."""
    if environment.get(SWITCH, "0") not in ("", "0"):
        model.register_forward_pre_hook(ForwardCheck())


class ForwardCheck:
    """A forward pre-hook. Raises RunError where another process does something else, or nothing, for `SECONDS`."""

    def __init__(self, seconds: float = SECONDS) -> None:
        store = private("torch.distributed.distributed_c10d:_get_default_store")()
        self._store, self._timeout, self._count = store.clone(), timedelta(seconds=seconds), 0

    def __call__(self, *_: Any) -> None:
        """Say what this forward is for, and wait until all others have said the same."""
        self._count += 1
        rank, ranks = distributed.get_rank(), range(distributed.get_world_size())
        self._store.set(self._key(rank), str(PROGRESS))
        try:
            self._store.wait([self._key(each) for each in ranks], self._timeout)
        except RuntimeError:
            missing = [each for each in ranks if not self._store.check([self._key(each)])]
            raise self._error(f"not begun by rank {', '.join(map(str, missing))}") from None
        others = {each: self._store.get(self._key(each)).decode() for each in ranks}
        if len(set(others.values())) > 1:
            raise self._error(", ".join(f"rank {each} {what}" for each, what in others.items()))

    def _key(self, rank: int) -> str:
        return f"forward/{self._count}/{rank}"

    def _error(self, got: str) -> RunError:
        where = f"forward {self._count} ({PROGRESS})"
        return RunError(Problem(where, "the processes make other forwards", "report this with the recipe", got))
