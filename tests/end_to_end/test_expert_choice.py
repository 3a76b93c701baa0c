"""`lora.experts: auto` through the real training: measured, written, resumed, merged; two processes choose as one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.checkpoint import CheckpointReader
from finetune.errors import RunError
from finetune.merge import merge
from finetune.recipe import load_recipe
from finetune.run import read_metrics
from finetune.train import train
from tests.end_to_end.workspaces import write_workspace
from tests.support import save_tiny_mixtral

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral, rows of several lengths, and a recipe that adapts half of the router's weight."""
    folder = tmp_path_factory.mktemp("workspace")
    save_tiny_mixtral(folder / "model")
    sections: dict[str, Any] = {
        "output_dir": str(folder / "one"),
        "model": {"name_or_path": str(folder / "model"), "load_in_4bit": True, "dtype": "float32"},
        "lora": {
            "targets": ["attention", "experts"],
            "r": 4,
            "lora_alpha": 8,
            "experts": "auto",
            "experts_share": 0.5,
            "experts_tokens": 600,
        },
        "router": {"router_aux_loss_coef": 0.1},
        "data": {"train": {"path": str(folder / "rows.jsonl"), "format": "prompt_completion"}, "max_length": 128},
    }
    write_workspace(folder, **sections)
    return folder


@pytest.fixture(scope="module")
def run(workspace: Path) -> Path:
    """The run folder of four uninterrupted steps."""
    return train(load_recipe(workspace / "recipe.yaml"), [])


def choice_of(run: Path) -> Any:
    return json.loads((run / "experts.json").read_text())


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    factors: dict[str, torch.Tensor] = load_file(run / "adapter" / "adapter_model.safetensors")
    return factors


def test_the_run_says_which_experts_it_adapts_and_adapts_those(run: Path) -> None:
    choice = choice_of(run)
    chosen = {layer["layer"]: layer["experts"] for layer in choice["layers"]}
    assert 0 < choice["adapted"] < 1
    assert 600 <= choice["tokens"] < 700
    assert json.loads((run / "adapter" / "finetune.json").read_text())["experts"] == choice
    parts = {part["part"]: part for part in json.loads((run / "audit.json").read_text())["parts"]}
    one_expert = 4 * ((64 + 192) + (96 + 64))
    assert parts["experts"]["trained"] == one_expert * sum(map(len, chosen.values()))
    for name, factor in adapter_of(run).items():
        if ".experts." in name and "lora_B" in name:
            experts = chosen[name.removeprefix("base_model.model.").partition(".mlp.")[0]]
            changed = factor.view(factor.shape[0], 4, 4).abs().sum((0, 1)).nonzero().flatten().tolist()
            assert changed == experts


def test_the_merged_model_differs_from_the_base_in_the_chosen_experts_only(run: Path, tmp_path: Path) -> None:
    merge(run / "adapter", tmp_path / "merged", show_progress=False)
    base, merged = CheckpointReader(run.parent / "model"), CheckpointReader(tmp_path / "merged")
    differing = {
        tuple(
            map(int, key.removeprefix("model.layers.").replace(".block_sparse_moe.experts.", " ").split(".")[0].split())
        )
        for key in base.keys
        if ".experts." in key and not torch.equal(base.read(key), merged.read(key))
    }
    chosen = [layer["experts"] for layer in choice_of(run)["layers"]]
    assert differing == {(number, expert) for number, experts in enumerate(chosen) for expert in experts}


def interrupted(run: Path, name: str) -> Path:
    """A copy of the run as a kill after its second step would have left it, and its recipe."""
    folder = run.with_name(name)
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoint-4")
    return folder


def test_a_resumed_run_takes_the_stored_choice_and_ends_as_the_uninterrupted_one(workspace: Path, run: Path) -> None:
    folder = interrupted(run, "resumed")
    # A mark by which a choice that was measured again would be known.
    (folder / "experts.json").write_text(json.dumps({**choice_of(run), "rows": 1234}))
    changes = [f"output_dir={folder}"]
    train(load_recipe(workspace / "recipe.yaml", changes), [])
    assert choice_of(folder)["rows"] == 1234
    resumed, whole = adapter_of(folder), adapter_of(run)
    assert resumed.keys() == whole.keys()
    for name, factor in whole.items():
        torch.testing.assert_close(resumed[name], factor, atol=1e-6, rtol=1e-5, msg=name)


def test_a_run_without_its_choice_is_not_continued(workspace: Path, run: Path) -> None:
    folder = interrupted(run, "lost")
    (folder / "experts.json").unlink()
    changes = [f"output_dir={folder}"]
    with pytest.raises(
        RunError, match="the run that is to be continued has no choice of experts; start anew in another"
    ):
        train(load_recipe(workspace / "recipe.yaml", changes), [])


@pytest.mark.slow
def test_two_processes_choose_and_train_as_one(workspace: Path, run: Path) -> None:
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "finetune.train", "recipe.yaml", f"output_dir={workspace / 'two'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=workspace, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "experts, " in done.stdout
    assert " % of the experts' parameters (measured on " in done.stdout
    assert choice_of(workspace / "two") == choice_of(run)
    losses = [
        [line["loss"] for line in read_metrics(each / "metrics.jsonl") if "loss" in line]
        for each in (run, workspace / "two")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)
