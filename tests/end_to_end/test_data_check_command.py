"""`finetune check` as a user starts it: what it prints and writes, and its exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli.main import main
from tests.end_to_end.workspaces import write_workspace
from tests.support import save_tiny_mixtral

SECTIONS = {
    "output_dir": "run",
    "model": {"name_or_path": "base", "load_in_4bit": False, "dtype": "float32"},
    "lora": {"targets": ["attention", "experts"], "r": 2, "lora_alpha": 4},
    "router": {"router_aux_loss_coef": 0},
    "data": {"train": {"path": "rows.jsonl", "format": "prompt_completion"}, "max_length": 64, "packing": True},
}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    save_tiny_mixtral(tmp_path / "base")
    write_workspace(tmp_path, **SECTIONS)
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "finetune.cli.main", *arguments]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "FINETUNE_CACHE": str(folder / "cache"), "PYTHONPATH": str(Path(__file__).parents[2])}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=folder, env=environment(folder), capture_output=True, text=True)


@pytest.mark.slow
def test_a_good_recipe_is_reported_and_the_run_after_it_finds_its_rows(workspace: Path) -> None:
    steps = ("training.max_steps=null", "training.num_train_epochs=1")
    done = run(workspace, "check", "recipe.yaml", *steps, "--html", "out/check.html", "--samples", "1")
    assert done.returncode == 0, done.stderr
    assert "rows       34 read, 34 (100.0 %) kept\n" in done.stdout
    assert "[[on " in done.stdout
    assert done.stdout.endswith(
        "\nNo errors found: every row that the run uses can be trained on.\nwritten: out/check.html\n"
    )
    assert "34 read, 34 (100.0 %) kept" in (workspace / "out" / "check.html").read_text(encoding="utf-8")
    steps_line = next(line for line in done.stdout.splitlines() if "sequences; an epoch has" in line).split()
    trained = run(workspace, "train", "recipe.yaml", *steps, "training.save_steps=null")
    assert trained.returncode == 0, trained.stderr
    assert "Tokenising" not in trained.stderr
    steps_taken = [
        json.loads(line).get("step") for line in (workspace / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert max(filter(None, steps_taken)) == int(steps_line[1])


def test_bad_rows_are_the_list_and_exit_1(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (workspace / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "light", "completion": null}\n{"prompt": "light"\n')
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("FINETUNE_CACHE", str(workspace / "cache"))
    assert main(["check", "recipe.yaml", "--html", "check.html"]) == 1
    errors = capsys.readouterr().err
    listed = [line for line in errors.splitlines() if line.startswith("rows.jsonl:")]
    assert [line.partition(": ")[0] for line in listed] == ["rows.jsonl:35", "rows.jsonl:36"]
    assert listed[0].startswith("rows.jsonl:35: completion: ")
    assert "Traceback" not in errors
    page = (workspace / "check.html").read_text(encoding="utf-8")
    assert "A run would not start: 2 problems." in page
    assert "rows.jsonl:35: completion: " in page


def test_what_the_terminal_cannot_spell_is_written_as_its_number(workspace: Path) -> None:
    plain = {**environment(workspace), "PYTHONIOENCODING": "ascii"}
    arguments = command("check", "recipe.yaml", "data.eval=null", "--samples", "1")
    done = subprocess.run(arguments, cwd=workspace, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "]]\\u23ce\n" in done.stdout


def test_a_reader_that_has_seen_enough_is_no_mistake() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command("schema"), stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_mistake_in_the_recipe_exits_2_before_anything_is_read(workspace: Path) -> None:
    (workspace / "rows.jsonl").unlink()
    done = run(workspace, "check", "recipe.yaml", "lora.alpha=3", "data.max_lenght=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()] == ["lora.alpha", "data.max_lenght"]
