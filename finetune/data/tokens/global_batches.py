"""How the rows of an epoch are divided among optimizer steps, processes and micro-batches.

A step takes the next `global_batch_size` rows of the epoch's order, whatever the number of processes. At the end of an
epoch rows are missing: those places stay empty, so that no row is used twice or left out, and every process has as many
micro-batches as the others. Of a micro-batch without any row, an empty list, a collator makes a row of weight 0.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch.utils.data import Sampler

Item = TypeVar("Item")
Order = Callable[[int], Sequence[int]]
"""The rows of an epoch in the order in which they are used, each once; called with the number of the epoch."""
Division = Callable[[Sequence[int]], list[list[int]]]
"""The rows of a step -> this process's micro-batches."""


class GlobalBatches(Sampler[list[int]]):
    """The micro-batches of one process: `accumulation` in each step, of `size` rows, fewer or none where rows end.

    Micro-batch m of a step, counted over all processes, belongs to process m % processes. `divide` replaces this rule.
    """

    def __init__(
        self,
        rows: int,
        order: Order,
        size: int,
        process: int = 0,
        processes: int = 1,
        accumulation: int = 1,
        divide: Division | None = None,
    ) -> None:
        self.rows, self.order, self.size, self.accumulation = rows, order, size, accumulation
        self.process, self.processes = process, processes
        self.divide = divide or self._micro_batches
        self.epoch = 0

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, over all processes and micro-batches."""
        return self.size * self.processes * self.accumulation

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.rows / self.rows_per_step) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order(self.epoch)
        for start in range(0, self.rows, self.rows_per_step):
            yield from self.divide(order[start : start + self.rows_per_step])

    def _micro_batches(self, step: Sequence[int]) -> list[list[int]]:
        first, stride = self.process * self.size, self.processes * self.size
        return [list(step[start : start + self.size]) for start in range(first, self.rows_per_step, stride)]


def equal_share(items: Sequence[Item], process: int, processes: int) -> list[tuple[Item, bool]]:
    """Every `processes`-th of the items, for one process, and whether it counts; all processes get as many.

    Those that would have none at the end get the last item once more, which does not count: where the model is sharded
    every forward needs all processes.
    """
    mine = [(item, True) for item in items[process::processes]]
    missing = math.ceil(len(items) / processes) - len(mine)
    return mine + [(item, False) for item in items[-1:]] * missing
