"""Rows of an epoch in optimizer steps, on processes, in micro-batches: each once, whatever the division."""

import math
from itertools import chain
from types import SimpleNamespace
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.tokens.global_batches import GlobalBatches, equal_share
from finetune.methods.batches import evaluation_batches, training_batches

NUMBERS = st.integers(1, 5)


def on_all(make: Any, processes: int) -> list[list[list[int]]]:
    """The micro-batches of every process."""
    return [list(make(process)) for process in range(processes)]


@given(rows=st.integers(1, 90), size=NUMBERS, processes=NUMBERS, accumulation=NUMBERS, epoch=st.integers(0, 3))
def test_every_row_is_used_once_and_every_process_makes_as_many_forwards(
    rows: int, size: int, processes: int, accumulation: int, epoch: int
) -> None:
    def order(number: int) -> list[int]:
        return [(row + number) % rows for row in range(rows)]

    def batches(process: int, processes: int = processes, accumulation: int = accumulation) -> GlobalBatches:
        made = GlobalBatches(rows, order, size, process, processes, accumulation)
        made.set_epoch(epoch)
        return made

    of_all, whole = on_all(batches, processes), list(batches(0, 1, processes * accumulation))
    assert sorted(chain(*chain(*of_all))) == list(range(rows))
    steps = math.ceil(rows / (size * processes * accumulation))
    assert {len(micro_batches) for micro_batches in of_all} == {len(batches(0))} == {steps * accumulation}
    assert [batch for together in zip(*of_all, strict=True) for batch in together] == whole
    assert all(len(batch) <= size for batch in whole)
    assert all(of_all[0][::accumulation]), "the first micro-batch of a step has rows"


def arguments(strategy: str, accumulation: int = 1) -> SimpleNamespace:
    names = {"length_column_name": "length", "eval_batch_size": 3, "data_seed": 42}
    return SimpleNamespace(
        train_sampling_strategy=strategy,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        **names,
    )


@given(rows=st.integers(1, 60), epoch=st.integers(0, 3))
def test_the_random_order_is_that_of_accelerate(rows: int, epoch: int) -> None:
    batches = training_batches(range(rows), arguments("random"), 0, 1)
    batches.set_epoch(epoch)
    theirs = SeedableRandomSampler(range(rows), data_seed=42)
    theirs.set_epoch(epoch)
    assert list(chain(*batches)) == list(theirs)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=60),
    strategy=st.sampled_from(["random", "sequential", "group_by_length", "batch_rebalance"]),
    processes=st.integers(1, 3),
    accumulation=st.integers(1, 3),
)
def test_a_step_has_the_same_rows_on_any_number_of_processes(
    lengths: list[int], strategy: str, processes: int, accumulation: int
) -> None:
    rows = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
    args = arguments(strategy, accumulation)
    of_all = on_all(lambda process: training_batches(rows, args, process, processes), processes)
    alone = list(training_batches(rows, arguments(strategy, processes * accumulation), 0, 1))
    assert {len(micro_batches) for micro_batches in of_all} == {len(alone) // processes}
    for step in range(len(alone) // (processes * accumulation)):
        start, end = step * accumulation, (step + 1) * accumulation
        together = [row for batches in of_all for batch in batches[start:end] for row in batch]
        assert sorted(together) == sorted(chain(*alone[start * processes : end * processes]))
    assert sorted(chain(*chain(*of_all))) == list(range(len(lengths)))
    evaluated = on_all(lambda process: evaluation_batches(rows, args, process, processes), processes)
    assert sorted(chain(*chain(*evaluated))) == list(range(len(lengths)))
    assert len({len(batches) for batches in evaluated}) == 1


@given(items=st.lists(st.integers(), max_size=30), processes=NUMBERS)
def test_a_share_is_as_long_as_the_others_and_counts_each_item_once(items: list[int], processes: int) -> None:
    shares = [equal_share(items, process, processes) for process in range(processes)]
    assert {len(share) for share in shares} == {math.ceil(len(items) / processes)}
    assert sorted(item for share in shares for item, counts in share if counts) == sorted(items)
