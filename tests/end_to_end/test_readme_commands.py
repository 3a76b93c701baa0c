"""Every command of the README and of docs/ except make's is run as written, in order, on a tiny model.

The rows are a part of the repository's, so that most of the time is not spent on generating answers.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli.main import main
from finetune.run import read_metrics
from tests.network import guarded, went_away
from tests.readme import COMMANDS, ROOT
from tests.support import save_tiny_mixtral

STRIDES = {"train": 6, "eval": 7, "dpo-train": 4, "dpo-eval": 4}
"""One row in so many of each file is kept. Both groups of held-out rows remain."""


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """What a checkout holds after `make quickstart` has made the model, with a tiny one in its place and fewer rows."""
    for name in ("recipes", "data", "accelerate_configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name, stride in STRIDES.items():
        path = tmp_path / "data" / "quickstart" / f"{name}.jsonl"
        rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(rows[::stride]), encoding="utf-8")
    save_tiny_mixtral(tmp_path / "models" / "quickstart-moe")
    return tmp_path


def run(command: str | list[str], folder: Path) -> str:
    """Run with the environment's own programs first on the path and without a network; returns what was printed.

    Nothing of what the command names is on the hub, so no other machine may be looked for. The recipes leave
    `logging.report_to` at auto, which is trackio here.
    """
    log = folder / "network.log"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = guarded(log, PATH=path)
    done = subprocess.run(
        command, cwd=folder, shell=isinstance(command, str), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert went_away(log) == []
    return done.stdout


def run_here(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Call the `finetune` program in this process, which has imported torch and transformers already."""
    _, *words = shlex.split(command)
    try:
        code = main(words)
    except SystemExit as done:  # --help
        code = int(done.code or 0)
    printed = capsys.readouterr()
    assert code == 0, f"{command}\n{printed.err}"
    return printed.out


@pytest.mark.slow
def test_the_shown_commands_work_one_after_the_other(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workspace)
    commands = [command for command in COMMANDS if not command.startswith("make ")]
    assert len(commands) >= 5
    # Training replaces its process by the launcher's.
    own_process = [command for command in commands if re.match(r"finetune train|accelerate", command)]
    printed = {
        command: run(command, workspace) if command in own_process else run_here(command, capsys)
        for command in commands
    }
    # The second training command found the run of the first one finished.
    steps = [line["step"] for line in read_metrics(workspace / "runs/quickstart/metrics.jsonl") if "ce_loss" in line]
    assert steps == [1, 2, 3, 4, 5]
    assert "the run in runs/quickstart is finished" in printed[own_process[1]]
    assert not (workspace / "runs" / "quickstart.1").exists()
    assert json.loads((workspace / "out" / "evaluation.json").read_text())["rows"] == 12
    assert (workspace / "out" / "merged" / "merge-report.json").is_file()
    assert json.loads(printed["finetune schema"])["title"]


@pytest.mark.slow
def test_the_dpo_driver_runs_the_quickstart_first_and_then_all_its_own_phases(workspace: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.quickstart_dpo", "--record", "record.json"]
    printed = run(command, workspace)

    for heading in ("held-out rows before", "train", "merge and prove", "held-out rows after", "One held-out row"):
        assert f"=== {heading}" in printed
    quickstart = json.loads((workspace / "runs" / "quickstart" / "quickstart.json").read_text())
    assert quickstart["exact_match_percent"]["before"].keys() == {"all", "values", "wording"}
    assert [phase["name"] for phase in quickstart["phases"]] == [
        "held-out rows before",
        "train",
        "merge and prove",
        "held-out rows after",
    ]
    assert all(phase["peak_mib"] > 100 for phase in quickstart["phases"])

    dpo = json.loads((workspace / "runs" / "quickstart-dpo" / "quickstart-dpo.json").read_text())
    assert dpo["none_percent"]["before"].keys() == {"all", "request", "topic"}
    assert dpo["exact_match_percent"]["after"].keys() == {"all", "values", "wording"}
    assert [phase["name"] for phase in dpo["phases"]] == [
        "requests before",
        "train",
        "merge and prove",
        "requests after",
        "commands after",
    ]
    assert json.loads((workspace / "record.json").read_text())["provenance"]["base"]["fingerprint"]
    assert (workspace / "out" / "merged-dpo" / "merge-report.json").is_file()
