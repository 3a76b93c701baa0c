"""The loaders of the trainers: rows in the order of `train_sampling_strategy`, divided by `GlobalBatches`.

accelerate would fill up the last batches of an epoch with rows from its beginning, which are then trained twice, and
transformers would group rows by length, on each process, with random numbers of that process.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler
from transformers.trainer_utils import seed_worker

from finetune.data.tokens.global_batches import GlobalBatches, Order


class NumberedRows(Dataset[dict[str, Any]]):
    """Rows with their `index` in the data set: what a row's dropout masks depend on."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "index": index}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [{**row, "index": index} for index, row in zip(indices, self.rows.__getitems__(indices), strict=True)]


class BatchLoader(DataLoader[Any]):
    """A loader whose batches are those of `GlobalBatches`; accelerate leaves it as it is."""

    def __init__(self, dataset: Any, batches: GlobalBatches, **settings: Any) -> None:
        super().__init__(dataset, batch_sampler=batches, **settings)
        self.batches = batches

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is; of a loader that skips the first batches transformers tells `batches`."""
        self.batches.set_epoch(epoch)


def training_batches(dataset: Any, args: Any, process: int, processes: int) -> GlobalBatches:
    """One process's share of every epoch; `args`: TRL's arguments."""
    strategy, rows, size = args.train_sampling_strategy, len(dataset), args.per_device_train_batch_size
    seed, accumulation = args.data_seed, args.gradient_accumulation_steps
    order: Order = partial(_random, rows, seed)
    divide = None
    if strategy == "sequential":
        order = lambda _epoch: range(rows)  # noqa: E731
    elif strategy == "group_by_length":
        order = partial(_by_length, _lengths(dataset, args), size * processes * accumulation, seed)
    elif strategy == "batch_rebalance":
        divide = _rebalanced(_lengths(dataset, args), process, processes, accumulation)
    return GlobalBatches(rows, order, size, process, processes, accumulation, divide)


def evaluation_batches(dataset: Any, args: Any, process: int, processes: int) -> GlobalBatches:
    """One process's share of the evaluation rows."""
    rows, size = len(dataset), args.eval_batch_size
    order: Order = lambda _epoch: range(rows)  # noqa: E731
    if args.train_sampling_strategy == "group_by_length":
        order = partial(_by_length, _lengths(dataset, args), size, args.data_seed)
    return GlobalBatches(rows, order, size, process, processes)


def loader(dataset: Any, batches: GlobalBatches, collator: Callable[..., Any], args: Any) -> BatchLoader:
    """With the settings that transformers gives its own."""
    return BatchLoader(
        dataset,
        batches,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
        in_order=args.dataloader_in_order,
        worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=batches.process),
    )


def _random(rows: int, seed: int, epoch: int) -> Sequence[int]:
    """The order of accelerate's SeedableRandomSampler."""
    order: list[int] = torch.randperm(rows, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    return order


def _lengths(dataset: Any, args: Any) -> list[int]:
    """Tokens of each row, from the column that transformers would read."""
    if args.length_column_name in dataset.column_names:
        return list(dataset[args.length_column_name])
    return [len(ids) for ids in dataset["input_ids"]]


def _by_length(lengths: list[int], size: int, seed: int, epoch: int) -> Sequence[int]:
    """Rows of similar length in each step, drawn alike by every process."""
    generator = torch.Generator().manual_seed(seed + epoch)
    return list(LengthGroupedSampler(size, lengths=lengths, generator=generator))


def _rebalanced(
    lengths: list[int], process: int, processes: int, accumulation: int
) -> Callable[[Sequence[int]], list[list[int]]]:
    """Micro-batches of about equal cost, as transformers cuts a step into them: rows of similar length, not so many."""
    groups = processes * accumulation

    def divide(step: Sequence[int]) -> list[list[int]]:
        if len(step) < groups:  # a row each
            return [list(step[group : group + 1]) for group in range(process, groups, processes)]
        sampler = BatchRebalanceSampler(
            [lengths[row] for row in step], len(step), processes, accumulation, shuffle=False, rank=process
        )
        return [[step[place] for place in micro_batch] for micro_batch in sampler]

    return divide
