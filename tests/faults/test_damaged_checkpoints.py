"""A damaged checkpoint is named and set aside, and the run goes on from the one before to the same bytes."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.checkpoint import SUMS_FILE, write_sums
from tests.faults.harness import SEED, Commands, randomness, some_short, wait_for
from tests.faults.runs import Run, Undisturbed, make_run

NEWEST, BEFORE = "checkpoint-4", "checkpoint-2"


@pytest.fixture(scope="session")
def killed(sft: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run killed between its second checkpoint and its third."""
    return _killed(sft.run, tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="session")
def other(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same moment of another run, with another seed."""
    run = make_run(commands, tmp_path_factory.mktemp("other"), seed=1)
    return _killed(run, tmp_path_factory.mktemp("other-killed"))


def _killed(run: Run, folder: Path) -> Run:
    run = run.copied_to(folder)
    running = run.start()
    assert wait_for((run.path / NEWEST).exists, running)
    running.kill()
    assert running.wait().code == -signal.SIGKILL
    shutil.rmtree(run.path / "checkpoint-6", ignore_errors=True)
    shutil.rmtree(run.path / "adapter", ignore_errors=True)
    assert run.checkpoints() == [2, 4]
    return run


Damage = Callable[[Path, Run], object]
"""Changes the newest checkpoint, with the other run at hand."""


def remove(name: str) -> Damage:
    return lambda newest, other: (newest / name).unlink()


def empty(name: str) -> Damage:
    return lambda newest, other: (newest / name).write_bytes(b"")


def cut(name: str) -> Damage:
    def damage(newest: Path, other: Run) -> None:
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(content[: randomness(f"cut {name}").randrange(1, len(content))])

    return damage


def zero(name: str) -> Damage:
    return lambda newest, other: (newest / name).write_bytes(bytes((newest / name).stat().st_size))


def flip(name: str) -> Damage:
    def damage(newest: Path, other: Run) -> None:
        content, random = bytearray((newest / name).read_bytes()), randomness(f"flip {name}")
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        (newest / name).write_bytes(content)

    return damage


def of_the_one_before(name: str) -> Damage:
    return lambda newest, other: shutil.copy(newest.with_name(BEFORE) / name, newest / name)


def of_another_run(name: str) -> Damage:
    return lambda newest, other: shutil.copy(other.path / NEWEST / name, newest / name)


def all_of(*damages: Damage) -> Damage:
    def damage(newest: Path, other: Run) -> None:
        for one in damages:
            one(newest, other)

    return damage


def whole_of_another_run(newest: Path, other: Run) -> None:
    shutil.rmtree(newest)
    shutil.copytree(other.path / NEWEST, newest)


def whole_of_another_step(newest: Path, other: Run) -> None:
    shutil.rmtree(newest)
    shutil.copytree(newest.with_name(BEFORE), newest)


def another_step_with_its_sums(newest: Path, other: Run) -> None:
    state = json.loads((newest / "trainer_state.json").read_text())
    (newest / "trainer_state.json").write_text(json.dumps({**state, "global_step": 3}))
    write_sums(newest)


def no_files(newest: Path, other: Run) -> None:
    shutil.rmtree(newest)
    newest.mkdir()


def no_folder(newest: Path, other: Run) -> None:
    shutil.rmtree(newest)
    newest.write_text("a file")


def a_line_less(newest: Path, other: Run) -> None:
    sums = newest / SUMS_FILE
    sums.write_text("".join(line for line in sums.read_text().splitlines(True) if "training_state.json" not in line))


def a_pickle(newest: Path, other: Run) -> None:
    """As torch writes one, under a name that is read: opening it would run a program."""
    (newest / "training_state.json").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")


WEIGHTS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "finetune.json"
TENSORS, TREE, STATE = "training_state.safetensors", "training_state.json", "trainer_state.json"
ROUTER, BIAS, IDENTITY = "router_balance.json", "router_bias.safetensors", "identity.json"
DAMAGES: dict[str, Damage] = {
    **{f"{name} removed": remove(name) for name in (WEIGHTS, CONFIG, TENSORS, TREE, STATE, ROUTER, BIAS)},
    **{f"{name} empty": empty(name) for name in (WEIGHTS, TREE, STATE)},
    **{f"{name} cut off": cut(name) for name in (WEIGHTS, TENSORS, TREE, STATE, ROUTER)},
    **{f"{name} zeroed": zero(name) for name in (WEIGHTS, TENSORS, STATE)},
    **{f"a bit of {name}": flip(name) for name in (WEIGHTS, TENSORS, TREE, RECORD, SUMS_FILE)},
    **{f"{name} of the one before": of_the_one_before(name) for name in (WEIGHTS, TENSORS, STATE, BIAS)},
    **{f"{name} of another run": of_another_run(name) for name in (IDENTITY, SUMS_FILE)},
    f"{SUMS_FILE} removed": remove(SUMS_FILE),
    f"{SUMS_FILE} a line less": a_line_less,
    "the whole of another run": whole_of_another_run,
    "the whole of another step": whole_of_another_step,
    "another step with its sums": another_step_with_its_sums,
    "no files": no_files,
    "a pickle": a_pickle,
}
assert len(DAMAGES) == 36


@pytest.fixture
def run(killed: Run, tmp_path: Path) -> Run:
    """A copy of the killed run."""
    shutil.copytree(killed.folder, tmp_path, dirs_exist_ok=True)
    return Run(killed.commands, tmp_path)


@pytest.mark.parametrize("name", some_short(list(DAMAGES), 3))
def test_the_run_goes_on_from_the_checkpoint_before(name: str, run: Run, other: Run, sft: Undisturbed) -> None:
    DAMAGES[name](run.path / NEWEST, other)
    said = run.finish().output
    assert f"{NEWEST} cannot be continued from and is kept as run/set-aside/{NEWEST}: " in said, f"{SEED}: {name}"
    assert f"continues from {BEFORE}" in said
    assert "weights_only" not in said
    assert name.split()[0] not in (WEIGHTS, TENSORS, TREE, STATE, ROUTER, BIAS, RECORD) or name.split()[0] in said
    assert (run.path / "set-aside" / NEWEST).is_dir()
    assert not (run.folder / "executed").exists()
    sft.assert_same(run, name)


@pytest.mark.faults
def test_a_file_of_its_name_is_set_aside_too(run: Run, other: Run, sft: Undisturbed) -> None:
    no_folder(run.path / NEWEST, other)
    run.finish()
    sft.assert_same(run, "a file in its place")


@pytest.mark.faults
def test_what_the_sums_do_not_list_is_not_read(run: Run, sft: Undisturbed) -> None:
    """The card, which users edit, and files that somebody has put beside."""
    (run.path / NEWEST / "README.md").write_text("mine")
    (run.path / NEWEST / "optimizer.pt").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    said = run.finish().output
    assert f"continues from {NEWEST}" in said
    assert not (run.folder / "executed").exists()
    (run.path / NEWEST / "optimizer.pt").unlink()
    found, wanted = run.files(), dict(sft.files)
    assert found.pop(f"{NEWEST}/README.md") == b"mine"
    del wanted[f"{NEWEST}/README.md"]
    assert found == wanted


def test_without_any_whole_one_the_run_starts_again(run: Run, sft: Undisturbed) -> None:
    for name in (BEFORE, NEWEST):
        flip(WEIGHTS)(run.path / name, run)
        remove(ROUTER)(run.path / name, run)
    said = run.finish().output
    assert "no whole checkpoint is left: the run starts again at its first step" in said
    assert sorted(path.name for path in (run.path / "set-aside").iterdir()) == [BEFORE, NEWEST]
    sft.assert_same(run, "both damaged")


@pytest.mark.faults
def test_a_damaged_run_that_is_killed_again_still_ends_the_same(run: Run, other: Run, sft: Undisturbed) -> None:
    all_of(cut(WEIGHTS), zero(TENSORS), of_another_run(TREE), remove(STATE))(run.path / NEWEST, other)
    running = run.start()
    assert wait_for((run.path / "set-aside" / NEWEST).exists, running)
    running.kill()
    running.wait()
    run.finish()
    sft.assert_same(run, "several files damaged, and killed")


@pytest.mark.faults
@pytest.mark.parametrize("name", ["metrics.jsonl", "router_load.jsonl", "times.jsonl", "identity.json", "audit.json"])
@pytest.mark.parametrize("damage", [empty, cut, zero, remove, flip])
def test_a_damaged_record_of_the_run_is_no_traceback(
    name: str, damage: Callable[[str], Damage], run: Run, sft: Undisturbed
) -> None:
    """What stands beside the checkpoints: the run ends with the same adapter, or says which file is wrong."""
    damage(name)(run.path, run)
    ended = run.start().wait()
    assert "Traceback" not in ended.output
    assert "weights_only" not in ended.output
    if ended.code != 0:
        assert name in ended.output.splitlines()[-1]
        return
    found = {path: content for path, content in run.files().items() if path.startswith("adapter/")}
    wanted = {path: content for path, content in sft.files.items() if path.startswith("adapter/")}
    assert found == wanted
