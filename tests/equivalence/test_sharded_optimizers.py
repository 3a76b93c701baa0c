"""Every optimizer that a sharded run may use takes the steps that it takes on whole parameters."""

import os
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

from finetune.methods.sharded_optimizer import load_state, state_on_main, step_on_parts, stepped_parameters
from finetune.methods.training_state import snapshot
from finetune.moe.sharding import whole
from finetune.parallelism.checks import SHARDED_OPTIMIZERS
from tests.equivalence.ranks import on_ranks
from tests.unit.test_training_state import ADMITTED

QUANTISED = 0.05
"""Largest difference of a step of 0.01, four times, where the states are kept in 8 bits: in blocks of other values."""


def made() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = ((48, 7), (7, 96), (96, 80))
    return torch.nn.Sequential(*(torch.nn.Linear(*size, bias=False) for size in sizes))


def take_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(8, 48, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()
        optimizer.step()
        model.zero_grad()


def optimizer_for(name: str, model: torch.nn.Module, folder: Path) -> torch.optim.Optimizer:
    arguments = TrainingArguments(output_dir=str(folder), optim=name, learning_rate=1e-2, use_cpu=True)
    make, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    optimizer: torch.optim.Optimizer = make([{"params": list(model.parameters()), "weight_decay": 0.01}], **settings)
    step_on_parts(optimizer)
    return optimizer


def compare(folder: Path) -> None:
    is_main = os.environ["RANK"] == "0"
    for name in sorted(set(SHARDED_OPTIMIZERS) & set(ADMITTED)):
        one, two, again = made(), made(), made()
        for model in (two, again):
            fully_shard(model, mesh=init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),)))
        optimizers = [optimizer_for(name, model, folder) for model in (one, two)]
        assert [id(each) for each in stepped_parameters(optimizers[1])] == [id(each) for each in two.parameters()]
        for model, optimizer in zip((one, two), optimizers, strict=True):
            take_steps(model, optimizer, range(4))
        differences = [
            (a - whole(b)).abs().max().item() for a, b in zip(one.parameters(), two.parameters(), strict=True)
        ]
        assert max(differences) <= (QUANTISED if name.endswith("8bit") else 5e-6), (name, differences)
        # From its state, the next steps are the same ones, to the bit.
        states = [snapshot(state_on_main(optimizers[1], is_main))]
        torch.distributed.broadcast_object_list(states)
        for parameter, value in zip(again.parameters(), two.parameters(), strict=True):
            parameter.data.copy_(value.data)
        fresh = optimizer_for(name, again, folder)
        load_state(fresh, states[0])
        take_steps(two, optimizers[1], range(4, 6))
        take_steps(again, fresh, range(4, 6))
        assert all(
            torch.equal(whole(a), whole(b)) for a, b in zip(two.parameters(), again.parameters(), strict=True)
        ), name


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_steps_on_parts_are_the_steps_on_whole_parameters(tmp_path: Path) -> None:
    assert set(ADMITTED) - set(SHARDED_OPTIMIZERS) == {"adafactor"}
    on_ranks(3, compare, tmp_path, folder=tmp_path)
