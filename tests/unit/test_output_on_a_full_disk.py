"""Output that goes to a file on a full disk: it ends a command with a message, and a training not at all."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FULL = Path("/dev/full")
TRAINING = """
import sys
from finetune.environment import print_plainly
print_plainly(may_be_lost=True)
for step in range(100):
    print("loss" * 1000)
    print("bar" * 1000, file=sys.stderr, flush=True)
print("the adapter is saved", file=open(sys.argv[1], "w"))
"""

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="the system has no device that is always full")


def test_a_training_goes_on_without_its_log(tmp_path: Path) -> None:
    words = [sys.executable, "-c", TRAINING, str(tmp_path / "saved")]
    with FULL.open("w") as full:
        done = subprocess.run(words, cwd=ROOT, stdout=full, stderr=full, check=False)
    assert done.returncode == 0
    assert (tmp_path / "saved").read_text() == "the adapter is saved\n"


def test_the_command_that_trains_keeps_its_exit_code_without_its_log() -> None:
    with FULL.open("w") as full:
        words = [sys.executable, "-m", "finetune.train", "no-recipe.yaml"]
        done = subprocess.run(words, cwd=ROOT, stdout=full, stderr=full, check=False)
    assert done.returncode == 2, "the recipe is missing"


def test_another_command_says_that_its_output_has_no_room() -> None:
    words = [sys.executable, "-m", "finetune.cli.main", "schema"]
    with FULL.open("w") as full:
        done = subprocess.run(words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "the disk is full" in done.stderr
    assert done.stderr.startswith("/dev/full: ")
    assert "Traceback" not in done.stderr
