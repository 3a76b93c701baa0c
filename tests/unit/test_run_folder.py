"""The run folder: what it refuses, and what is recorded in it."""

import json
import subprocess
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import PartialState

from finetune.data import set_template_day, template_day
from finetune.errors import RunError
from finetune.run.provenance import _toolkit_commit, collect_provenance
from finetune.run.run_folder import RunFolder
from finetune.train import _set_template_day
from tests.support import tiny_tokenizer


def test_the_paths_are_below_the_folder(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "one")
    assert {path.parent for path in (run.adapter, run.recipe, run.audit, run.metrics, run.provenance)} == {run.path}


def test_a_run_that_died_before_its_first_step_may_be_started_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for path in (run.identity, run.audit, run.experts, run.provenance, tmp_path / ".tmp-1-audit.json"):
        path.write_text("")
    run.check_contents()
    assert not run.has_begun


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoint-5", "adapter"])
def test_a_run_has_begun_once_it_has_logged_or_saved(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir() if name == "adapter" else (tmp_path / name).write_text("")
    assert RunFolder(tmp_path).has_begun


def test_a_folder_with_foreign_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"files that are not a run's; got thesis.tex; choose another output_dir"):
        RunFolder(tmp_path).check_contents()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="output_dir is a file; name a folder"):
        RunFolder(tmp_path / "run").check_contents()


def test_a_resumed_run_writes_the_date_of_its_first_start(tmp_path: Path) -> None:
    base: Any = SimpleNamespace(tokenizer=tiny_tokenizer())
    base.tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + base.tokenizer.chat_template
    run, today = RunFolder(tmp_path), date.today().isoformat()
    PartialState()
    for audit, resume, day in (
        (None, True, today),
        ({"rows": {}}, True, today),  # of an earlier version
        ({"rows": {}, "template_day": "2025-03-01"}, True, "2025-03-01"),
        ({"rows": {}, "template_day": "2025-03-01"}, False, today),
    ):
        if audit is not None:
            run.audit.write_text(json.dumps(audit))
        set_template_day(base.tokenizer, None)
        _set_template_day(base, run, resume)
        assert template_day(base.tokenizer) == day


def test_provenance_says_what_the_run_was_made_from() -> None:
    base = {"name_or_path": "models/tiny", "fingerprint": "sha256:0"}
    result = collect_provenance(base, seed=7, command_line=["finetune", "train", "r.yaml"])
    assert (result["base"], result["seed"], result["command_line"]) == (base, 7, ["finetune", "train", "r.yaml"])
    assert result["packages"]["torch"].startswith("2.")
    assert result["packages"]["triton"] is None or result["hardware"]["gpus"]
    assert result["hardware"]["cpu_count"] >= 1
    assert result["started"].endswith("+00:00")
    json.dumps(result, allow_nan=False)


def test_the_commit_is_the_toolkits_own_and_says_when_it_was_changed(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    source = tmp_path / "source.py"
    source.write_text("")
    assert _toolkit_commit(source) is None
    git("init")
    git("commit", "--allow-empty", "-m", "somebody's work")
    assert _toolkit_commit(source) is None, "inside a repository, but not tracked in it: somebody else's"
    git("add", "source.py")
    git("commit", "-m", "first")
    clean = _toolkit_commit(source)
    assert clean is not None
    assert (len(clean["commit"]), clean["dirty"]) == (40, False)
    source.write_text("changed")
    assert _toolkit_commit(source) == {**clean, "dirty": True}
