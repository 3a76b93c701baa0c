"""Runs that a signal stops, that meet a full disk, or that meet each other."""

import json
import signal
import socket
from pathlib import Path

import pytest

from tests.faults.harness import SEED, assert_same_files, disk_of, randomness, some_short, succeed, wait_for
from tests.faults.runs import STEPS, Run, Undisturbed

CODES = {signal.SIGTERM: 0, signal.SIGUSR1: 85, signal.SIGINT: 130}
MOMENTS = [(name, number) for number in range(4) for name in ("SIGTERM", "SIGUSR1", "SIGINT")]


@pytest.mark.parametrize("moment", some_short(MOMENTS, 2))
def test_a_signal_ends_a_run_with_a_checkpoint_and_the_command_goes_on(
    moment: tuple[str, int], sft: Undisturbed, tmp_path: Path
) -> None:
    name, number = moment
    sent = signal.Signals[name]
    run = sft.run.copied_to(tmp_path)
    seconds = randomness(f"{name} {number}").uniform(0.2, 0.9) * sft.seconds
    running = run.start()
    if not running.has_ended(seconds):
        running.send(sent)
    ended = running.wait()
    how = f"seed {SEED}, {name} after {seconds:.3f} s:\n{ended.output}"
    assert ended.code == CODES[sent] or (run.path / "adapter").is_dir(), how
    assert "Traceback" not in ended.output, how
    if not (run.path / "adapter").is_dir():
        assert "the same command" in ended.output, how
        assert max(run.checkpoints(), default=0) == run.steps_logged(), how
    run.finish()
    # A signal between two saving steps leaves its checkpoint in the place of an earlier one.
    assert_same_files(last_of(run.files()), last_of(sft.files), f"{name} after {seconds:.3f} s")


def last_of(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without the checkpoints before the last step."""
    last = f"checkpoint-{STEPS}/"
    return {name: text for name, text in files.items() if name.startswith(last) or not name.startswith("checkpoint-")}


def test_a_second_run_in_the_folder_is_refused_and_the_first_goes_on(sft: Undisturbed, tmp_path: Path) -> None:
    run = sft.run.copied_to(tmp_path)
    first = run.start()
    assert wait_for((run.path / "checkpoint-2").exists, first)
    first.send(signal.SIGSTOP)
    second = run.start().wait()
    assert second.code == 1
    assert f"another process is training in this folder; got pid {first.number} on {socket.gethostname()};" in (
        second.output
    )
    assert "Traceback" not in second.output
    first.send(signal.SIGCONT)
    succeed(first.wait())
    sft.assert_same(run, "another one wanted the folder")


@pytest.mark.faults
def test_of_two_runs_that_start_at_once_one_goes_on(sft: Undisturbed, tmp_path: Path) -> None:
    run = sft.run.copied_to(tmp_path)
    ended = [running.wait() for running in (run.start(), run.start())]
    assert sorted(one.code for one in ended) == [0, 1], [one.output for one in ended]
    assert not any("Traceback" in one.output for one in ended)
    run.finish()
    sft.assert_same(run, "two at once")


@pytest.mark.faults
def test_a_run_that_has_just_been_killed_does_not_hold_its_folder(sft: Undisturbed, tmp_path: Path) -> None:
    run = sft.run.copied_to(tmp_path)
    first = run.start()
    assert wait_for((run.path / ".lock").exists, first)
    first.kill()
    run.finish()
    first.wait()
    sft.assert_same(run, "started again at once")


def checkpoint_bytes(run: Run) -> int:
    return sum(path.stat().st_size for path in (run.path / f"checkpoint-{STEPS}").iterdir())


# In checkpoints. A run needs three and an adapter while it writes the last one, before it removes one.
SIZES = (0.02, 0.3, 0.9, 1.4, 2.1, 2.6, 3.2)


@pytest.mark.parametrize("size", some_short(SIZES, 1))
def test_a_full_disk_costs_nothing_that_was_saved(size: float, sft: Undisturbed, tmp_path: Path) -> None:
    run = sft.run.copied_to(tmp_path)
    one = checkpoint_bytes(sft.run)
    try:
        with disk_of(run.path, max(int(size * one), 2**14)) as resize:
            ended = run.start().wait()
            said = f"{size} checkpoints of {one} bytes:\n{ended.output}"
            assert "Traceback" not in ended.output, said
            assert ended.code == 1 or (run.path / "adapter").is_dir(), said
            assert not list(run.path.glob(".checkpoint-*.partial")), said
            resize(20 * one)
            run.finish()
            sft.assert_same(run, f"a disk of {size} checkpoints")
            if ended.code:
                last = ended.output.splitlines()[-1]
                assert last.startswith("run"), said
                assert "needed" in ended.output, said
                assert "free" in ended.output, said
    except PermissionError as error:
        pytest.skip(f"no disk of one's own here: {error}")


@pytest.mark.faults
@pytest.mark.parametrize("number", range(3))
def test_a_disk_that_is_full_for_a_while_is_tried_again(number: int, sft: Undisturbed, tmp_path: Path) -> None:
    """The run goes on, says so, and saves once there is space."""
    run, one = sft.run.copied_to(tmp_path), checkpoint_bytes(sft.run)
    room = randomness(f"disk {number}").uniform(1.1, 1.8)
    try:
        with disk_of(run.path, int(room * one)) as resize:
            running = run.start()
            full = "the run goes on, and it"
            wait_for(lambda: full in running.output, running)
            resize(20 * one)
            ended = succeed(running.wait())
            assert full in ended.output
            assert json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == STEPS
            assert {path.name for path in (run.path / "adapter").iterdir()} == {
                name.partition("/")[2] for name in sft.files if name.startswith("adapter/")
            }
    except PermissionError as error:
        pytest.skip(f"no disk of one's own here: {error}")
