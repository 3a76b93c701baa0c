"""Runs killed at random moments: the same command ends with the same bytes as if nothing had happened."""

import random
import shutil
from pathlib import Path

import pytest

from tests.faults.harness import kill_at, randomness, some_short, wait_for
from tests.faults.runs import PAIR_COUNT, Undisturbed

SFT_KILLS, DPO_KILLS = 20, 10


def kill_and_finish(of: Undisturbed, folder: Path, moment: float) -> None:
    run = of.run.copied_to(folder)
    kill_at(run.start(), moment)
    how = f"killed after {moment:.3f} of {of.seconds:.3f} s, with checkpoints {run.checkpoints()}"
    run.finish()
    of.assert_same(run, how)


def moment_of(of: Undisturbed, random: random.Random) -> float:
    return random.uniform(0.05, 1) * of.seconds


@pytest.mark.parametrize("number", some_short(range(SFT_KILLS), 2))
def test_a_killed_sft_run_ends_as_if_it_had_not_been(number: int, sft: Undisturbed, tmp_path: Path) -> None:
    kill_and_finish(sft, tmp_path, moment_of(sft, randomness(f"sft {number}")))


@pytest.mark.parametrize("number", some_short(range(DPO_KILLS), 1))
def test_a_killed_dpo_run_ends_as_if_it_had_not_been(number: int, dpo: Undisturbed, tmp_path: Path) -> None:
    kill_and_finish(dpo, tmp_path, moment_of(dpo, randomness(f"dpo {number}")))


# A checkpoint is being written; has the optimizer state; has its name. The pictures are drawn; the adapter is written.
PLACES = (
    ".checkpoint-2.partial",
    ".checkpoint-4.partial/training_state.safetensors",
    "checkpoint-4",
    ".checkpoint-6.partial/SHA256SUMS",
    "checkpoint-6",
    "loss_curve.png",
    ".adapter.partial",
    "adapter",
)


@pytest.mark.faults
@pytest.mark.parametrize("place", PLACES)
def test_a_run_killed_while_it_saves_ends_as_if_it_had_not_been(place: str, sft: Undisturbed, tmp_path: Path) -> None:
    run = sft.run.copied_to(tmp_path)
    running = run.start()
    wait_for((run.path / place).exists, running, seconds=0.002)
    running.kill()
    running.wait()
    run.finish()
    sft.assert_same(run, f"killed when {place} was there")


def test_a_reference_goes_on_at_the_pair_where_it_stopped(dpo: Undisturbed, tmp_path: Path) -> None:
    """Pair by pair, so that there is time to kill it."""
    run = dpo.run.copied_to(tmp_path)
    path = run.path / "reference" / "train.0.jsonl"
    one_by_one = "training.per_device_train_batch_size=1"
    running = run.start(one_by_one)
    assert wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") >= 2, running)
    running.kill()
    running.wait()
    kept = path.read_text().splitlines()[:2]
    assert 2 <= path.read_bytes().count(b"\n") < PAIR_COUNT
    assert not (run.path / "metrics.jsonl").exists()
    run.finish(one_by_one)
    assert path.read_text().splitlines()[:2] == kept
    assert path.read_bytes().count(b"\n") == PAIR_COUNT


@pytest.mark.faults
@pytest.mark.parametrize("number", range(3))
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(number: int, sft: Undisturbed, tmp_path: Path) -> None:
    """Each start gets as far as to one more checkpoint at most."""
    run, random = sft.run.copied_to(tmp_path), randomness(f"again and again {number}")
    for _ in range(6):
        kill_at(run.start(), random.uniform(0.3, 0.8) * sft.seconds)
    run.finish()
    sft.assert_same(run, "killed six times")


@pytest.mark.faults
def test_a_finished_run_is_left_as_it_is(sft: Undisturbed, tmp_path: Path) -> None:
    run = sft.run.copied_to(tmp_path)
    shutil.copytree(sft.run.path, run.path)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.name != ".lock"}
    assert "the run in run is finished: its adapter is run/adapter" in run.finish().output
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.name != ".lock"} == before
