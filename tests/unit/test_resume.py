"""How a run goes on: what it continues from, what it refuses, and what is kept of an earlier one."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.checkpoint import write_sums
from finetune.errors import RunError
from finetune.recipe import Recipe, dump_recipe
from finetune.run.checkpoints import (
    REQUIRED,
    checkpoints,
    newest_step,
    remove_leftovers,
    remove_old,
    replace_by,
    replacement,
    whole_checkpoints,
)
from finetune.run.resume import (
    Identity,
    begin_anew,
    check_allowed,
    check_keys,
    earlier_recipe,
    go_on,
    identity_of,
    recipe_changes,
    row_changes,
)
from finetune.run.run_folder import RunFolder
from finetune.run.run_lock import unlock_run
from finetune.start import open_run
from tests.unit.recipe_writing import SOUND, RecipeFile

ROWS = {"train": {"sets": [{"name": "a.jsonl", "digest": "1"}, {"name": "b.jsonl", "digest": "2"}]}}


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecipeFile:
    return RecipeFile(tmp_path, monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    return folder


def save_checkpoint(run: RunFolder, step: int, identity: str = "ours") -> Path:
    folder = run.path / f"checkpoint-{step}"
    folder.mkdir()
    for name in REQUIRED:
        (folder / name).write_text(json.dumps({"global_step": step, "max_steps": 9, "identity": identity}))
    write_sums(folder)
    return folder


def refused(action: Any, *arguments: Any) -> list[str]:
    with pytest.raises(RunError) as error:
        action(*arguments)
    return str(error.value).splitlines()


# The recipe, the base and the rows.


def changes(before: Recipe, now: Recipe) -> list[str]:
    return [change.key for change in recipe_changes(before, now)]


def test_settings_that_do_not_change_the_result_are_free(recipe_file: RecipeFile) -> None:
    free = ("logging.report_to=none", "training.save_steps=3", "save.keep=4", "training.resume=never", "output_dir=b")
    assert changes(recipe_file.load(SOUND), recipe_file.load(SOUND, *free)) == []


def test_the_cut_of_a_step_is_free_unless_the_balance_term_depends_on_it(recipe_file: RecipeFile) -> None:
    cut, scope = "training.per_device_train_batch_size=4", "router.scope=micro_batch"
    assert changes(recipe_file.load(SOUND), recipe_file.load(SOUND, cut)) == []
    assert changes(recipe_file.load(SOUND, scope), recipe_file.load(SOUND, scope, cut)) == [
        "training.per_device_train_batch_size"
    ]


def test_every_other_change_is_shown_and_can_be_allowed_by_its_key(recipe_file: RecipeFile, run: RunFolder) -> None:
    now = recipe_file.load(SOUND, "training.learning_rate=1e-4", "data.template_args={enable_thinking: false}")
    found = recipe_changes(recipe_file.load(SOUND), now)
    assert refused(check_allowed, run, found, []) == [
        f"training.learning_rate: the run in {run.path} began with 0.001; got 0.0001; set it back to continue that "
        "run, add --allow-change training.learning_rate to continue with the change, or name another output_dir",
        f"data.template_args.enable_thinking: the run in {run.path} began with None; got False; set it back to "
        "continue that run, add --allow-change data.template_args.enable_thinking to continue with the change, or "
        "name another output_dir",
    ]
    assert len(refused(check_allowed, run, found, ["data"])) == 1
    assert check_allowed(run, found, ["training.learning_rate", "data.template_args"]) == [
        "training.learning_rate: 0.001 became 0.0001, which --allow-change allows",
        "data.template_args.enable_thinking: None became False, which --allow-change allows",
    ]


def test_what_decides_the_tensors_of_a_checkpoint_cannot_be_changed(recipe_file: RecipeFile, run: RunFolder) -> None:
    found = recipe_changes(recipe_file.load(SOUND), recipe_file.load(SOUND, "lora.r=4"))
    assert refused(check_allowed, run, found, ["lora.r"]) == [
        f"lora.r: the run in {run.path} began with 8; got 4; set it back to continue that run, or name another "
        "output_dir: no checkpoint fits this change"
    ]


def test_a_key_that_no_recipe_has_cannot_be_allowed() -> None:
    check_keys(["training.max_steps", "data.train", "data.train[0].path", "model.name_or_path"])
    assert refused(check_keys, ["training.steps"]) == [
        "--allow-change: no recipe has this key; got training.steps; write a key of the recipe, such as "
        "training.max_steps or data.train"
    ]


@pytest.mark.parametrize("digest", ["2", "3"])
def test_other_rows_are_a_change_of_their_data_set(run: RunFolder, digest: str) -> None:
    now = {"train": {"sets": [{"name": "a.jsonl", "digest": "1"}, {"name": "b.jsonl", "digest": digest}]}}
    assert row_changes(run, now) == [], "nothing is recorded yet"
    run.audit.write_text(json.dumps({"rows": ROWS}))
    found = [(change.key, change.now) for change in row_changes(run, now)]
    assert found == ([] if digest == "2" else [("data.train", "other rows of b.jsonl")])


def test_the_identity_says_what_a_run_is_made_of_and_not_where_it_is(recipe_file: RecipeFile) -> None:
    def of(*overrides: str, base: str = "f", rows: Any = ROWS, adapter: str | None = None) -> str:
        return identity_of(recipe_file.load(SOUND, *overrides), {"fingerprint": base}, rows, adapter)

    assert of() == of("output_dir=elsewhere", "training.save_steps=7", "model.name_or_path=models/copy")
    others = {of("seed=3"), of(base="g"), of(rows={}), of(adapter="a"), of("training.learning_rate=0.5")}
    assert len(others | {of()}) == 6


def test_a_run_without_a_step_is_started_with_any_recipe(recipe_file: RecipeFile, run: RunFolder) -> None:
    run.recipe.write_text(dump_recipe(recipe_file.load(SOUND)))
    assert earlier_recipe(run) is None
    run.metrics.write_text("")
    assert earlier_recipe(run) == recipe_file.load(SOUND)


def test_a_damaged_record_of_the_recipe_is_read_from_a_checkpoint(recipe_file: RecipeFile, run: RunFolder) -> None:
    recipe = recipe_file.load(SOUND, f"output_dir={run.path}")
    run.recipe.write_text("garbage")
    run.metrics.write_text("")
    assert refused(earlier_recipe, run) == [
        f"{run.recipe}: the run's own record of its recipe cannot be read; got {run.recipe}:1: a recipe is a mapping; "
        'got "garbage"; write `key: value` lines, as in recipes/; put it back, or write training.resume: never, '
        "which keeps this run aside and starts anew"
    ]
    newest = save_checkpoint(run, 4)
    saved = recipe.model_dump(mode="json", exclude={"output_dir": True, "training": {"resume"}})
    (newest / "finetune.json").write_text(json.dumps({"recipe": saved}))
    assert earlier_recipe(run) == recipe


def test_a_checkpoint_to_go_back_to_needs_a_run(recipe_file: RecipeFile, tmp_path: Path) -> None:
    empty = tmp_path / "typo"
    recipe = recipe_file.load(SOUND, f"output_dir={empty}", "training.resume=runs/mine/checkpoint-4")
    try:
        assert refused(open_run, RunFolder(empty), recipe, ()) == [
            "training.resume: there is no run in output_dir to go back in; got runs/mine/checkpoint-4; name its "
            "output_dir, or write auto"
        ]
    finally:
        unlock_run(empty)


# The folder and its checkpoints.


def test_a_run_continues_from_its_newest_checkpoint(run: RunFolder) -> None:
    save_checkpoint(run, 9)
    newest = save_checkpoint(run, 10)
    (run.path / "checkpoint-old").mkdir()
    begun = go_on(run, "auto", "ours", changed=False)
    assert (begun.checkpoint, begun.is_finished) == (newest, False)
    assert begun.lines == [f"the run in {run.path} continues from checkpoint-10"]


def damage_missing(folder: Path) -> None:
    (folder / "training_state.json").unlink()


def damage_bit(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_text("other")


def damage_sums(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()


def damage_list(folder: Path) -> None:
    (folder / "trainer_state.json").unlink()
    write_sums(folder)


def damage_name(folder: Path) -> None:
    (folder / "trainer_state.json").write_text('{"global_step": 3, "max_steps": 9}')
    write_sums(folder)


def damage_state(folder: Path) -> None:
    (folder / "trainer_state.json").write_text("[" * 100_000)
    write_sums(folder)


def damage_identity(folder: Path) -> None:
    (folder / "identity.json").write_text('{"identity": "theirs"}')
    write_sums(folder)


DAMAGE = {
    "training_state.json: is missing": damage_missing,
    "adapter_model.safetensors: differs from its sum": damage_bit,
    "SHA256SUMS is missing: the checkpoint is not whole, or of an earlier version": damage_sums,
    "SHA256SUMS does not list trainer_state.json": damage_list,
    "its state is of another step than its name says; got 3": damage_name,
    "trainer_state.json: not the state of a trainer": damage_state,
    "a checkpoint of another run": damage_identity,
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_checkpoint_that_is_not_whole_or_not_ours_is_set_aside_and_the_one_before_taken(
    run: RunFolder, reason: str
) -> None:
    before, newest = save_checkpoint(run, 2), save_checkpoint(run, 4)
    DAMAGE[reason](newest)
    begun = go_on(run, "auto", "ours", changed=False)
    assert begun.checkpoint == before
    assert begun.lines[0].startswith(f"checkpoint-4 cannot be continued from and is kept as {run.path}/set-aside/")
    assert reason in begun.lines[0]
    assert (run.path / "set-aside" / "checkpoint-4").is_dir()
    assert list(checkpoints(run.path)) == [2]


def test_without_a_whole_checkpoint_the_run_starts_again(run: RunFolder) -> None:
    damage_bit(save_checkpoint(run, 2))
    begun = go_on(run, "auto", "ours", changed=False)
    assert begun.checkpoint is None
    assert begun.lines[-1] == "no whole checkpoint is left: the run starts again at its first step"
    assert go_on(run, "auto", "ours", changed=False).lines == []


def test_a_finished_run_is_only_said_to_be(run: RunFolder) -> None:
    run.adapter.mkdir()
    assert go_on(run, "auto", "ours", changed=False).is_finished
    assert run.adapter.is_dir()


def test_the_identity_of_a_run_stays_where_another_version_would_compute_another_one(run: RunFolder) -> None:
    run.identity.write_text('{"identity": "ours", "earlier": []}')
    newest = save_checkpoint(run, 4)
    begun = go_on(run, "auto", "computed otherwise", changed=False)
    assert (begun.identity, begun.checkpoint) == ("ours", newest)


def test_an_allowed_change_continues_also_a_finished_run_from_its_earlier_checkpoints(run: RunFolder) -> None:
    run.identity.write_text('{"identity": "ours", "earlier": []}')
    newest = save_checkpoint(run, 4)
    run.adapter.mkdir()
    begun = go_on(run, "auto", "longer", changed=True)
    assert (begun.identity, begun.checkpoint, begun.is_finished) == ("longer", newest, False)
    assert f"the finished adapter is kept as {run.path}/adapter.1" in begun.lines
    assert Identity.read(run) == Identity("longer", ("ours",))


def test_a_named_checkpoint_is_gone_back_to_and_later_ones_are_kept(run: RunFolder) -> None:
    first = save_checkpoint(run, 2)
    for step in (4, 6):
        save_checkpoint(run, step)
    begun = go_on(run, str(first), "ours", changed=False)
    assert begun.checkpoint == first
    assert begun.lines[0] == f"later checkpoints are kept in {run.path}/set-aside: checkpoint-4, checkpoint-6"


def test_a_named_checkpoint_must_be_whole_and_of_this_run(run: RunFolder, tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "other")
    other.path.mkdir()
    assert refused(go_on, run, str(save_checkpoint(other, 2)), "ours", False) == [
        f"training.resume: not a checkpoint of the run in output_dir; got {other.path}/checkpoint-2; name a folder "
        f"checkpoint-N of {run.path}, or auto"
    ]
    theirs = save_checkpoint(run, 4, identity="theirs")
    assert "a checkpoint of another run" in refused(go_on, run, str(theirs), "ours", False)[0]


def test_a_run_that_starts_anew_keeps_the_earlier_one(run: RunFolder) -> None:
    run.adapter.mkdir()
    try:
        lines = begin_anew(run, "new").lines
        assert lines == [f"the earlier run in {run.path} is kept as {run.path}.1"]
        assert (run.path.with_name("run.1") / "adapter").is_dir()
        assert sorted(path.name for path in run.path.iterdir()) == [".lock", "identity.json"]
    finally:
        unlock_run(run.path)


def test_what_another_recipe_has_prepared_is_not_used(run: RunFolder) -> None:
    run.identity.write_text('{"identity": "other"}')
    run.experts.write_text("{}")
    run.reference.mkdir()
    begin_anew(run, "new")
    assert not run.experts.exists()
    assert not run.reference.exists()
    run.reference.mkdir()
    begin_anew(run, "new")
    assert run.reference.exists(), "of the same recipe: a killed run goes on with it"


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(run: RunFolder) -> None:
    for name in (".checkpoint-4.partial", ".checkpoint-2.removed", ".checkpoint-mine"):
        (run.path / name).mkdir()
    (run.path / ".checkpoint-4.lock").write_text("")
    remove_leftovers(run.path)
    assert [path.name for path in run.path.iterdir()] == [".checkpoint-mine"]


def test_the_newest_checkpoints_and_the_best_are_kept(run: RunFolder) -> None:
    for step in (2, 4, 6, 8, 10):
        save_checkpoint(run, step)
    remove_old(run.path, keep=2, best=4)
    assert list(checkpoints(run.path)) == [4, 8, 10]
    assert newest_step(run.path) == 10
    damage_bit(run.path / "checkpoint-10")
    assert [step for step, _ in whole_checkpoints(run.path)] == [8, 4]


def test_a_checkpoint_that_was_to_take_the_place_of_another_does_so_after_a_kill(run: RunFolder) -> None:
    old = save_checkpoint(run, 4)
    new = replacement(old)
    old.rename(new)
    (new / "finetune.json").write_text("evaluated")
    old = save_checkpoint(run, 4)
    replace_by(old, new)
    assert (old / "finetune.json").read_text() == "evaluated"
    old.rename(new)  # what a kill between the two renames leaves
    remove_leftovers(run.path)
    assert [path.name for path in run.path.iterdir()] == ["checkpoint-4"]
