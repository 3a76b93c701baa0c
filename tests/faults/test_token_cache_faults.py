"""Rows whose preparing is killed: no entry that is not whole, and the same command then makes the same one."""

import json
import signal
from pathlib import Path

import pytest

from tests.end_to_end.workspaces import write_workspace
from tests.faults.harness import (
    Commands,
    assert_same_files,
    files_of,
    kill_at,
    randomness,
    some_short,
    succeed,
    wait_for,
)
from tests.support import save_tiny_mixtral

KILLS = 10
ROWS = 12_000


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that take seconds to prepare, packed."""
    folder = tmp_path_factory.mktemp("workspace")
    save_tiny_mixtral(folder / "base")
    write_workspace(
        folder,
        output_dir="run",
        model={"name_or_path": "base", "load_in_4bit": False, "dtype": "float32"},
        lora={"targets": ["attention", "experts"], "r": 2, "lora_alpha": 4},
        router={"router_aux_loss_coef": 0},
        data={"train": {"path": "rows.jsonl", "format": "prompt_completion"}, "max_length": 512, "packing": True},
    )
    rows = ({"prompt": f"light {number} " * (1 + number % 40), "completion": "on"} for number in range(ROWS))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


CHECK = ("check", "recipe.yaml")


@pytest.fixture(scope="module")
def whole(workspace: Path, commands: Commands) -> tuple[dict[str, bytes], float]:
    """The cache of an undisturbed command, and the command's seconds once everything is imported."""
    for name in ("first", "whole"):
        done = succeed(commands.run(workspace, *CHECK, FINETUNE_CACHE=name))
    return files_of(workspace / "whole"), done.seconds


@pytest.mark.parametrize("number", some_short(range(KILLS), 2))
def test_a_kill_at_any_moment(
    number: int, workspace: Path, whole: tuple[dict[str, bytes], float], commands: Commands, tmp_path: Path
) -> None:
    moment, cache = randomness(f"tokens {number}").uniform(0, whole[1]), str(tmp_path)
    kill_at(commands.start(workspace, *CHECK, FINETUNE_CACHE=cache), moment)
    left = {name: content for name, content in files_of(tmp_path).items() if not name.startswith(".")}
    assert left.items() <= whole[0].items()
    succeed(commands.run(workspace, *CHECK, FINETUNE_CACHE=cache))
    assert_same_files(files_of(tmp_path), whole[0], f"killed after {moment:.3f} s")


def test_a_ctrl_c_while_rows_are_prepared_is_one_word(
    workspace: Path, whole: tuple[dict[str, bytes], float], commands: Commands, tmp_path: Path
) -> None:
    running = commands.start(workspace, *CHECK, FINETUNE_CACHE=str(tmp_path))
    assert wait_for(lambda: any(tmp_path.iterdir()), running)
    running.send(signal.SIGINT)
    ended = running.wait()
    assert ended.code == 130, ended.output
    assert ended.output.splitlines()[-1] == "interrupted"
    assert "Traceback" not in ended.output
    succeed(commands.run(workspace, *CHECK, FINETUNE_CACHE=str(tmp_path)))
    assert_same_files(files_of(tmp_path), whole[0], "interrupted")
