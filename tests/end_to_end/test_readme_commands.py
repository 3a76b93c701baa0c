"""Every command of the README and of docs/ except make's is run as written, in order, on a tiny model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.run import read_metrics
from tests.readme import COMMANDS, ROOT
from tests.support import save_tiny_mixtral


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """What a checkout holds after `make quickstart` has made the model, with a tiny one in its place."""
    for name in ("recipes", "data", "accelerate_configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    save_tiny_mixtral(tmp_path / "models" / "quickstart-moe")
    return tmp_path


def run(command: str | list[str], folder: Path, **variables: str) -> str:
    """Run with the environment's own programs first on the path; returns what was printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **variables}
    done = subprocess.run(
        command, cwd=folder, shell=isinstance(command, str), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_shown_commands_work_one_after_the_other(workspace: Path) -> None:
    commands = [command for command in COMMANDS if not command.startswith("make ")]
    assert len(commands) >= 5
    printed = {command: run(command, workspace) for command in commands}
    # Both training commands ran: the second kept the run of the first.
    for name in ("quickstart.1", "quickstart"):
        steps = [
            line["step"] for line in read_metrics(workspace / "runs" / name / "metrics.jsonl") if "ce_loss" in line
        ]
        assert steps == [1, 2, 3, 4, 5]
    assert json.loads((workspace / "out" / "evaluation.json").read_text())["rows"] == 84
    assert (workspace / "out" / "merged" / "merge-report.json").is_file()
    assert json.loads(printed["finetune schema"])["title"]


@pytest.mark.slow
def test_the_quickstart_driver_goes_through_all_its_phases(workspace: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "quickstart.py"), "--record", "record.json"]
    printed = run(command, workspace)
    for heading in ("held-out rows before", "train", "merge and prove", "held-out rows after", "One held-out row"):
        assert f"=== {heading}" in printed
    told = json.loads((workspace / "runs" / "quickstart" / "quickstart.json").read_text())
    assert told["exact_match_percent"]["before"].keys() == {"all", "values", "wording"}
    assert [phase["name"] for phase in told["phases"]] == [
        "held-out rows before",
        "train",
        "merge and prove",
        "held-out rows after",
    ]
    assert all(phase["peak_mib"] > 100 for phase in told["phases"])
    assert json.loads((workspace / "record.json").read_text())["provenance"]["base"]["fingerprint"]


@pytest.mark.slow
def test_the_dpo_driver_runs_the_quickstart_first_and_then_all_its_own_phases(workspace: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.quickstart_dpo", "--record", "record.json"]
    printed = run(command, workspace, PYTHONPATH=str(ROOT))
    assert "=== held-out rows after" in printed
    told = json.loads((workspace / "runs" / "quickstart-dpo" / "quickstart-dpo.json").read_text())
    assert told["none_percent"]["before"].keys() == {"all", "request", "topic"}
    assert told["exact_match_percent"]["after"].keys() == {"all", "values", "wording"}
    assert [phase["name"] for phase in told["phases"]] == [
        "requests before",
        "train",
        "merge and prove",
        "requests after",
        "commands after",
    ]
    assert json.loads((workspace / "record.json").read_text())["provenance"]["base"]["fingerprint"]
    assert (workspace / "out" / "merged-dpo" / "merge-report.json").is_file()
