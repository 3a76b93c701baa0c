"""Options of the merge: `--prompts`, `--no-proof`, unusable values, and the progress that the command prints."""

import json
from pathlib import Path
from typing import Any

import pytest

import finetune.cli.merge
from finetune.cli.main import main
from finetune.errors import WeightsError
from finetune.merge import DTYPES, INTO, merge
from finetune.merge.proof import PROMPTS
from tests.support import save_tiny_mixtral
from tests.unit.merge_adapters import save_adapter


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = save_tiny_mixtral(tmp_path_factory.mktemp("mixtral"))
    return save_adapter(base, tmp_path_factory.mktemp("adapter"))


def test_the_users_prompts_take_the_place_of_the_fixed_ones(adapter: Path, tmp_path: Path) -> None:
    fixed = merge(adapter, tmp_path / "fixed", show_progress=False)
    (tmp_path / "prompts.txt").write_text("turn on the light\n\nset the timer to ten minutes\n")
    own = merge(adapter, tmp_path / "own", prompts=tmp_path / "prompts.txt", show_progress=False)
    assert 0 < own.logits.tokens < fixed.logits.tokens
    assert own.logits.adapter_effect_mean != fixed.logits.adapter_effect_mean


def test_the_help_says_how_many_prompts_are_fixed(capsys: pytest.CaptureFixture[str]) -> None:
    """The command names the constants of the merge without importing torch."""
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    assert f"(default: {len(PROMPTS)} fixed ones)" in " ".join(capsys.readouterr().out.split())
    assert tuple(DTYPES) == finetune.cli.merge.DTYPES
    assert INTO == finetune.cli.merge.INTO


def test_prompts_that_cannot_be_read(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"away.txt: cannot be read; got .*; give a text file, one prompt a line"):
        merge(adapter, tmp_path / "out", prompts=tmp_path / "away.txt", show_progress=False)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(WeightsError, match=r"empty.txt: holds no prompt; write one prompt a line"):
        merge(adapter, tmp_path / "out", prompts=tmp_path / "empty.txt", show_progress=False)
    assert not (tmp_path / "out").exists()


def test_the_command_says_how_much_goes_where_and_shows_bytes_and_time(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(adapter), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert f"merge: 34 of 41 tensors change; 0.00 GiB go to {tmp_path / 'out'}" in printed.out
    assert "merge: 100%" in printed.err
    assert "B/s]" in printed.err
    assert "NOT PROVEN" not in printed.out


def test_without_a_proof_the_command_says_what_nobody_has_looked_at(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(adapter), "--output", str(tmp_path / "out"), "--no-proof"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NOT PROVEN")]
    assert len(lines) == 2
    assert "that the merged model gives the logits of base + adapter" in lines[1]
    report = json.loads((tmp_path / "out" / "merge-report.json").read_text())
    assert report["proof"]["logits"] is None
    assert len(report["proof"]["not_proven"]) == 2
    assert "NOT PROVEN" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [float("nan")]}, "--weights: must be finite and not zero; got nan; give numbers"),
        ({"weights": [float("inf")]}, "--weights: must be finite and not zero; got inf"),
        ({"weights": [0.0]}, "--weights: must be finite and not zero; got 0"),
        ({"compare_rows": 0}, "--compare-rows: must be at least 1; got 0; give a number of rows"),
        ({"prompts": Path("x"), "prove": False}, "--prompts: has no effect with --no-proof; leave out"),
    ],
)
def test_unusable_options_are_refused(adapter: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        merge(adapter, tmp_path / "out", show_progress=False, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == []
