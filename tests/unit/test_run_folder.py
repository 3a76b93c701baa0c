"""The run folder: what it refuses, what it continues, and files that appear whole or not at all."""

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
from finetune.recipe import dump_recipe
from finetune.run.provenance import _toolkit_commit, collect_provenance
from finetune.run.run_folder import RunFolder, check_same_recipe, check_same_rows
from finetune.train import _set_template_day
from tests.support import tiny_tokenizer
from tests.unit.recipe_writing import SOUND, RecipeFile


def save_checkpoint(run: RunFolder, step: int, state: str = "{}") -> Path:
    folder = run.path / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(state)
    return folder


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "one")
    run.create()
    assert run.path.is_dir()
    assert {path.parent for path in (run.adapter, run.recipe, run.audit, run.metrics, run.provenance)} == {run.path}


def test_a_run_that_died_before_its_first_step_is_started_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for path in (run.recipe, run.audit, run.experts, run.provenance, tmp_path / ".tmp-1-audit.json"):
        path.write_text("")
    run.create()


def test_a_finished_run_is_kept_aside_under_the_next_free_number(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    for number in (1, 2):
        run.adapter.mkdir(parents=True)
        run.metrics.write_text(str(number))
        assert run.create() == tmp_path / f"run.{number}"
        assert list(run.path.iterdir()) == []
    assert [(tmp_path / f"run.{number}" / "metrics.jsonl").read_text() for number in (1, 2)] == ["1", "2"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoint-5"])
def test_a_folder_that_holds_an_unfinished_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(RunError) as error:
        RunFolder(tmp_path).create()
    assert str(error.value) == (
        f"{tmp_path}: output_dir holds an unfinished run; got {name}; choose another output_dir, or remove this one"
    )


def test_continuing_is_offered_where_there_is_something_to_continue_from(tmp_path: Path) -> None:
    save_checkpoint(RunFolder(tmp_path), 5)
    with pytest.raises(RunError, match=r"remove this one, or set training.resume_from_checkpoint=true to continue it"):
        RunFolder(tmp_path).create()


def test_a_finished_run_is_not_continued(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    save_checkpoint(run, 5)
    run.adapter.mkdir()
    with pytest.raises(RunError, match=r"the run is finished, there is nothing to continue; set training.resume_from_"):
        run.create(resume=True)


def test_a_run_is_continued_only_as_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_file = RecipeFile(tmp_path, monkeypatch)
    run = RunFolder(Path("runs/test"))
    run.path.mkdir(parents=True)
    run.recipe.write_text(dump_recipe(recipe_file.load(SOUND)))
    free = ("logging.report_to=none", "training.save_steps=3", "training.resume_from_checkpoint=true")
    check_same_recipe(run, recipe_file.load(SOUND, *free))
    changed = ("training.learning_rate=1e-4", "lora.r=4", "data.template_args={enable_thinking: false}")
    with pytest.raises(RunError) as error:
        check_same_recipe(run, recipe_file.load(SOUND, *changed, *free))
    assert str(error.value).splitlines() == [
        "lora.r: the run in runs/test was made with 8; got 4; "
        "set it back to continue that run, or name another output_dir",
        "training.learning_rate: the run in runs/test was made with 0.001; got 0.0001; "
        "set it back to continue that run, or name another output_dir",
        "data.template_args.enable_thinking: the run in runs/test was made with None; got False; "
        "set it back to continue that run, or name another output_dir",
    ]


def test_a_run_is_continued_only_on_the_rows_that_it_began_with(tmp_path: Path) -> None:
    def rows(digest: str) -> dict[str, Any]:
        return {"train": {"sets": [{"name": "a.jsonl", "digest": "1"}, {"name": "b.jsonl", "digest": digest}]}}

    run = RunFolder(tmp_path)
    check_same_rows(run, rows("2"))
    run.audit.write_text(json.dumps({"rows": rows("2")}))
    check_same_rows(run, rows("2"))
    with pytest.raises(RunError) as error:
        check_same_rows(run, rows("3"))
    assert str(error.value) == (
        f"b.jsonl: its rows are not those that the run in {tmp_path} began with; "
        "put the data back as it was to continue that run, or name another output_dir"
    )


def test_a_resumed_run_writes_the_date_of_its_first_start(tmp_path: Path) -> None:
    base: Any = SimpleNamespace(tokenizer=tiny_tokenizer())
    base.tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + base.tokenizer.chat_template
    run, today = RunFolder(tmp_path), date.today().isoformat()
    PartialState()
    for audit, resume, day in (
        (None, True, today),
        ({"rows": {}}, True, today),  # of an earlier version
        ({"template_day": "2025-03-01"}, True, "2025-03-01"),
        ({"template_day": "2025-03-01"}, False, today),
    ):
        if audit is not None:
            run.audit.write_text(json.dumps(audit))
        set_template_day(base.tokenizer, None)
        _set_template_day(base, run, resume)
        assert template_day(base.tokenizer) == day


def test_the_cut_of_a_step_is_free_unless_the_balance_term_depends_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_file = RecipeFile(tmp_path, monkeypatch)
    run = RunFolder(Path("runs/test"))
    run.path.mkdir(parents=True)
    cut = "training.per_device_train_batch_size=4"
    run.recipe.write_text(dump_recipe(recipe_file.load(SOUND)))
    check_same_recipe(run, recipe_file.load(SOUND, cut))
    run.recipe.write_text(dump_recipe(recipe_file.load(SOUND, "router.scope=micro_batch")))
    with pytest.raises(RunError, match=r"training.per_device_train_batch_size: the run in runs/test was made with 1"):
        check_same_recipe(run, recipe_file.load(SOUND, "router.scope=micro_batch", cut))


def test_a_folder_with_foreign_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"files that are not a run's; got thesis.tex; choose another output_dir"):
        RunFolder(tmp_path).create()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="output_dir is a file; name a folder"):
        RunFolder(tmp_path / "run").create()


def test_resuming_continues_from_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    save_checkpoint(run, 9)
    whole = save_checkpoint(run, 10)
    save_checkpoint(run, 11, state='{"global_step": 1')
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-old").mkdir()
    run.create(resume=True)
    assert run.newest_checkpoint() == whole


def test_resuming_where_there_is_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no whole checkpoint to continue from; set training.resume_from_checkpoint=f"):
        RunFolder(tmp_path / "typo").create(resume=True)
    assert not (tmp_path / "typo").exists()


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
