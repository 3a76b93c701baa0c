"""No command looks up a name or opens a connection that the recipe did not ask for, with and without a network."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.end_to_end.workspaces import write_workspace
from tests.equivalence.dpo_runs import write_pairs
from tests.network import guarded, went_away
from tests.support import save_tiny_mixtral

pytestmark = pytest.mark.faults

BIN = Path(sys.executable).parent
FINETUNE = str(BIN / "finetune")
ROWS = {"path": "rows.jsonl", "format": "prompt_completion"}
PAIRS = {"path": "pairs.jsonl", "format": "preference"}
COMMANDS = [
    ["families"],
    ["check", "sft.yaml"],
    ["template", "base"],
    ["train", "sft.yaml"],
    ["train", "dpo.yaml"],
    ["merge", "sft/adapter", "--output", "merged"],
    ["evaluate", "merged", "--data", "rows.jsonl", "--format", "prompt_completion", "--output", "evaluation.json"],
    ["export", "sft/adapter", "--format", "peft", "--output", "exported"],
    ["inspect", "sft"],
    ["inspect", "sft/adapter"],
    ["inspect", "merged"],
]
"""In an order in which each finds what it needs."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    save_tiny_mixtral(folder / "base")
    write_pairs(folder / "pairs.jsonl", 16)
    sections: dict[str, Any] = {
        "output_dir": "sft",
        "model": {"name_or_path": "base", "load_in_4bit": True, "dtype": "float32"},
        "lora": {"targets": ["attention", "experts"], "r": 4, "lora_alpha": 8},
        "router": {"router_aux_loss_coef": 0.1},
        "data": {"train": dict(ROWS), "eval": dict(ROWS), "max_length": 64},
    }
    write_workspace(folder, **sections)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["training"]["max_steps"] = 2
    (folder / "sft.yaml").write_text(yaml.safe_dump(recipe))
    recipe |= {"output_dir": "dpo", "method": {"kind": "dpo", "beta": 0.5, "reference": "precomputed"}}
    recipe["data"] |= {"train": dict(PAIRS), "eval": dict(PAIRS)}
    recipe["model"]["adapter"] = "sft/adapter"
    (folder / "dpo.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def run(folder: Path, command: list[str], **variables: str) -> list[str]:
    """What the command, run to its end, looked for beyond this machine."""
    log = folder / "network.log"
    log.unlink(missing_ok=True)
    home = {"HOME": str(folder / "home"), "HF_HOME": str(folder / "home" / "hf")}
    home["FINETUNE_CACHE"] = str(folder / "cache")
    environment = guarded(log, **home, **variables)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return went_away(log)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_no_command_goes_to_the_network(workspace: Path, words: list[str]) -> None:
    assert run(workspace, [FINETUNE, *words]) == []


@pytest.mark.parametrize("launcher", ["accelerate", "python"])
def test_nor_does_a_run_under_another_launcher(workspace: Path, launcher: str) -> None:
    config = Path(__file__).resolve().parents[2] / "accelerate_configs" / "cpu.yaml"
    words = {
        "accelerate": [str(BIN / "accelerate"), "launch", "--config_file", str(config)],
        "python": [sys.executable],
    }[launcher]
    variables = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    assert run(workspace, [*words, "-m", "finetune.train", "sft.yaml", f"output_dir={launcher}"], **variables) == []


@pytest.mark.parametrize(("dashboard", "variables"), [("auto", {}), ("[trackio, wandb]", {"WANDB_MODE": "offline"})])
def test_dashboards_stay_on_this_machine(workspace: Path, dashboard: str, variables: dict[str, str]) -> None:
    folder = f"dashboards-{len(variables)}"
    words = ["train", "sft.yaml", f"output_dir={folder}", f"logging.report_to={dashboard}"]
    assert run(workspace, [FINETUNE, *words], **variables) == []
    assert (workspace / folder / "adapter").is_dir()


def test_telemetry_that_the_user_turns_on_is_seen_by_the_guard(workspace: Path) -> None:
    """Without this the tests above would prove nothing."""
    words = ["train", "sft.yaml", "output_dir=telemetry"]
    away = run(workspace, [FINETUNE, *words], HF_HUB_DISABLE_TELEMETRY="0")
    assert away
    assert all("huggingface.co" in line and "_telemetry.py" in line for line in away)


def test_a_run_needs_no_network_at_all(workspace: Path) -> None:
    """In a network namespace of its own, in which not even the loopback interface is up."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-n", "true"], capture_output=True).returncode:
        pytest.skip("a network namespace needs Linux, util-linux's unshare and root")
    for words in (["check", "sft.yaml"], ["train", "sft.yaml", "output_dir=alone", "logging.report_to=auto"]):
        assert run(workspace, [unshare, "-n", FINETUNE, *words]) == []
    assert (workspace / "alone" / "adapter").is_dir()
