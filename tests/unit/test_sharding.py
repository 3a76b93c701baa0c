"""4-bit weights as flat bytes, which part of them a process holds, and what a sharded model refuses."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed
from torch.distributed.fsdp import fully_shard

from finetune.errors import RunError, WeightsError
from finetune.moe.forward_check import ForwardCheck, check_forwards
from finetune.moe.nf4 import Nf4Part, Nf4Stack
from finetune.moe.stored_bytes import ALIGNMENT, Share, StackBytes
from finetune.progress import PROGRESS
from tests.equivalence.ranks import on_ranks

SIZES = [(4, 96, 64), (3, 5, 7), (2, 128, 257), (1, 64, 64)]


def stack_of(shape: tuple[int, ...]) -> Nf4Stack:
    return Nf4Stack.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("shape", SIZES)
def test_a_stack_in_flat_bytes_has_the_values_of_the_stack(shape: tuple[int, ...]) -> None:
    stack = stack_of(shape)
    layout = StackBytes(stack.shape, stack.dtype)
    flat = layout.flatten(stack.stored)
    assert flat.dtype == torch.uint8
    assert flat.shape == (layout.total,)
    assert layout.expert_bytes % ALIGNMENT == 0
    view = layout.stack(flat)
    assert torch.equal(view.dequantize(), stack.dequantize())
    assert torch.equal(view.expert(shape[0] - 1), stack.expert(shape[0] - 1))
    assert torch.equal(view.rows(0, 1, 3), stack.rows(0, 1, 3))
    before = view.expert(0)
    flat.random_(generator=torch.Generator().manual_seed(1))
    assert view.packed_EN.data_ptr() == flat.data_ptr()  # a view, not a copy
    assert not torch.equal(view.packed_EN[0], stack.packed_EN[0])
    assert before.shape == shape[1:]


@given(experts=st.integers(1, 9), rows=st.integers(1, 40), columns=st.integers(1, 40), count=st.integers(1, 12))
def test_the_parts_of_all_processes_are_the_whole_and_touch_few_experts(
    experts: int, rows: int, columns: int, count: int
) -> None:
    layout = StackBytes(torch.Size((experts, rows, columns)), torch.float32)
    shares = [Share(index, count) for index in range(count)]
    parts = [share.of(layout.total) for share in shares]
    assert [byte for part in parts for byte in part] == list(range(layout.total))
    assert len({len(part) for part in parts}) <= 3  # equal ones, a shorter one, empty ones
    for share, part in zip(shares, parts, strict=True):
        held = layout.experts(share)
        assert 1 <= len(held) <= experts // count + 2
        if part:
            assert held.start * layout.expert_bytes <= part.start
            assert part.stop <= held.stop * layout.expert_bytes


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_parts_that_processes_quantise_are_the_bytes_of_the_stack(count: int) -> None:
    weight = torch.randn((4, 5, 70), generator=torch.Generator().manual_seed(0))
    stack = Nf4Stack.quantize(weight)
    layout = StackBytes(stack.shape, stack.dtype)
    shares = [Share(index, count) for index in range(count)]
    parts = [layout.quantize_part(share, (weight[each] for each in layout.experts(share))) for share in shares]
    assert torch.equal(torch.cat([part.flat for part in parts]), layout.flatten(stack.stored))


def test_the_bytes_of_some_experts_are_those_of_the_whole_stack() -> None:
    stack = stack_of((4, 96, 64))
    layout = StackBytes(stack.shape, stack.dtype)
    some = layout.flatten([tensor[1:3] for tensor in stack.stored])
    assert torch.equal(some, layout.flatten(stack.stored)[layout.expert_bytes : 3 * layout.expert_bytes])


@pytest.mark.parametrize("ask", ["dequantize()", "expert(0)", "rows(0, 0, 1)", "maxima(slice(0, 1))"])
def test_a_part_of_a_stack_gives_no_values(ask: str) -> None:
    layout, share = StackBytes(torch.Size((4, 96, 64)), torch.float32), Share(1, 2)
    loaded = layout.quantize_part(share, torch.randn(2, 96, 64))
    part = torch.nn.Parameter(loaded, requires_grad=False).to(torch.bfloat16).data
    assert isinstance(part, Nf4Part)
    assert (part.shape, part.dtype, part.held) == (layout.shape, torch.bfloat16, range(2, 4))
    message = (
        "4-bit expert stack: this process holds 2 of 4 experts, and the model is not sharded yet; call .*shard_model"
    )
    with pytest.raises(WeightsError, match=message):
        eval(f"part.{ask}", {"part": part})


class _Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = torch.nn.Parameter(stack_of((4, 96, 64)), requires_grad=False)


def _shard_unprepared(_: Path) -> None:
    with pytest.raises(WeightsError, match="4-bit expert stack: an operation would make the stack dense, split it"):
        fully_shard(_Experts())


def test_fully_shard_refuses_a_model_that_was_not_prepared(tmp_path: Path) -> None:
    """A tensor subclass that answered would become dense in silence."""
    on_ranks(2, _shard_unprepared, tmp_path, folder=tmp_path)


def _one_forward_more(folder: Path) -> None:
    check = ForwardCheck(seconds=2)
    PROGRESS.doing = "evaluating"
    check()
    if distributed.get_rank() == 0:
        with pytest.raises(RunError) as error:
            check()
        (folder / "more").write_text(str(error.value))
    threading.Event().wait(3)  # the first process has the store


def _another_forward(folder: Path) -> None:
    check = ForwardCheck(seconds=10)
    PROGRESS.doing = "evaluating" if distributed.get_rank() else "training"
    with pytest.raises(RunError) as error:
        check()
    (folder / f"other{distributed.get_rank()}").write_text(str(error.value))
    threading.Event().wait(1)


def test_a_process_that_makes_other_forwards_is_named(tmp_path: Path) -> None:
    on_ranks(2, _one_forward_more, tmp_path, folder=tmp_path)
    on_ranks(2, _another_forward, tmp_path, folder=tmp_path)
    do = "report this with the recipe"
    assert (tmp_path / "more").read_text() == (
        f"forward 2 (evaluating): the processes make other forwards; got not begun by rank 1; {do}"
    )
    assert (tmp_path / "other1").read_text() == (
        f"forward 1 (evaluating): the processes make other forwards; got rank 0 training, rank 1 evaluating; {do}"
    )


def test_forwards_are_compared_only_where_the_environment_says_so() -> None:
    class Model(torch.nn.Module):
        hooks: Any = ()

        def register_forward_pre_hook(self, hook: Any, **_: Any) -> Any:
            self.hooks = (*self.hooks, hook)

    model = Model()
    check_forwards(model, {})
    check_forwards(model, {"FINETUNE_CHECK_FORWARDS": "0"})
    assert model.hooks == ()
