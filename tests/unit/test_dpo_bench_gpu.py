"""`python -m benchmarks.gpu_pairs` as a dry run on the CPU: it must run at first try on a GPU lent by the minute."""

import json
from pathlib import Path

import pytest

from benchmarks import gpu_pairs


def test_the_dry_run_measures_every_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "dpo-gpu.json"
    monkeypatch.setattr("sys.argv", ["gpu_pairs", "--dry-run", "--output", str(output)])
    gpu_pairs.main()
    found = json.loads(output.read_text())
    arms = {"SFT", "DPO padded", "DPO flat", "DPO shared", "DPO padded, live", "DPO shared, live"}
    assert set(found["raw"]["seconds"]) == arms
    assert all(len(seconds) == gpu_pairs.ROUNDS for seconds in found["raw"]["seconds"].values())
    assert found["raw"]["token_gain"] == pytest.approx(32 / 21, abs=1e-6)
    assert "DPO, live / SFT, time" in capsys.readouterr().out


def test_the_committed_result_is_of_a_clean_commit_on_a_gpu() -> None:
    facts = json.loads(gpu_pairs.RESULT.read_text())["provenance"]
    assert facts["git"]["dirty"] is False
    assert facts["hardware"]["gpus"]
