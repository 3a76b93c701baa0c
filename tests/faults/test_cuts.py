"""Steps cut into other micro-batches, on other numbers of processes, over two epoch ends: the training is the same."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from finetune.run import read_metrics
from tests.end_to_end.workspaces import write_workspace
from tests.equivalence.dpo_runs import write_pairs
from tests.equivalence.ranks import free_port
from tests.faults.harness import Commands, succeed
from tests.faults.runs import PAIRS, SOURCE, Run
from tests.support import save_tiny_mixtral

COUNT = 34  # 2 in the last step of an epoch
METHODS: dict[str, dict[str, Any]] = {
    "sft": {"method": {"kind": "sft"}, "data": {"train": dict(SOURCE), "eval": dict(SOURCE), "max_length": 64}},
    "dpo": {
        "method": {"kind": "dpo", "beta": 0.5},
        "data": {"train": dict(PAIRS), "eval": dict(PAIRS), "max_length": 64},
    },
}
SECTIONS: dict[str, Any] = {
    "output_dir": "run",
    "model": {"name_or_path": "base", "load_in_4bit": True, "dtype": "float32"},
    "lora": {"targets": ["attention", "experts", "router"], "r": 4, "lora_alpha": 8},
    "router": {"router_aux_loss_coef": 0.1},
    "training": {
        "max_steps": 10,
        "learning_rate": 0.01,
        "global_batch_size": 8,
        "per_device_train_batch_size": 4,
        "eval_steps": 5,
        "save_steps": 8,
        "gradient_checkpointing": "none",
    },
}


def finish(run: Run, processes: int, size: int) -> Path:
    """Run to its end on so many processes, as torchrun starts them, with micro-batches of `size`."""
    everywhere = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
    everywhere |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    words = ("train", "recipe.yaml", f"training.per_device_train_batch_size={size}")
    ranks = [
        run.commands.start(run.folder, *words, RANK=str(rank), LOCAL_RANK=str(rank), **everywhere)
        for rank in range(processes)
    ]
    ended = [succeed(rank.wait()) for rank in ranks]
    assert f"{processes} process" in ended[0].output, ended[0].output
    return run.path


@pytest.fixture(scope="module", params=list(METHODS))
def one(request: pytest.FixtureRequest, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of one process."""
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_mixtral(folder / "base")
    write_workspace(folder, **SECTIONS, **METHODS[request.param])
    write_pairs(folder / "pairs.jsonl", COUNT)
    run = Run(commands, folder)
    finish(run, processes=1, size=4)
    return run


@pytest.mark.faults
@pytest.mark.parametrize(("processes", "size"), [(2, 2), (4, 2)])
def test_another_cut_takes_the_same_steps(one: Run, tmp_path: Path, processes: int, size: int) -> None:
    other = finish(one.copied_to(tmp_path), processes, size)
    lines, wanted = (read_metrics(path / "metrics.jsonl") for path in (other, one.path))
    for line, expected in zip(lines, wanted, strict=True):
        assert line.keys() == expected.keys()
        assert all(line.get(name) == expected.get(name) for name in ("step", "epoch", "num_tokens"))
        for name in expected.keys() & {"loss", "grad_norm", "ce_loss", "dpo_loss", "balance_loss", "eval_loss"}:
            assert line[name] == pytest.approx(expected[name], abs=1e-5, rel=1e-5), (name, line["step"])
    ours, theirs = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (other, one.path))
    assert ours.keys() == theirs.keys()
    assert all((factor - theirs[name]).abs().max() < 5e-4 for name, factor in ours.items())


@pytest.mark.faults
def test_a_run_continues_in_the_middle_of_an_epoch_on_two_processes(one: Run, tmp_path: Path) -> None:
    """With the same micro-batches: to the bit."""
    run = one.copied_to(tmp_path)
    shutil.copytree(one.path, run.path)
    for name in ("adapter", "checkpoint-10"):
        shutil.rmtree(run.path / name)
    assert run.checkpoints()[-1] == 8
    finish(run, processes=2, size=4)
    assert read_metrics(run.path / "metrics.jsonl") == read_metrics(one.path / "metrics.jsonl")
    adapter = Path("adapter", "adapter_model.safetensors")
    assert (run.path / adapter).read_bytes() == (one.path / adapter).read_bytes()
