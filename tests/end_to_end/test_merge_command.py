"""`finetune merge` as a user runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli.main import main
from finetune.merge import REPORT_FILE
from tests.support import save_tiny_mixtral
from tests.unit.merge_adapters import load, logits, save_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("base"), "bfloat16", hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter"), b_std=0.3)


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "finetune.cli.main", "merge", *map(str, words)]


def test_the_command_writes_a_model_that_equals_base_and_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    done = subprocess.run(command(adapter, "--output", output), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == [output]
    assert "each used exactly once" in done.stdout
    assert (output / REPORT_FILE).is_file()
    merged, adapted, plain = (logits(load(*folders)) for folders in ((output,), (base, adapter), (base,)))
    assert (merged - adapted).abs().mean() <= 0.1 * (plain - adapted).abs().mean()


def test_a_refusal_exits_1_with_its_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(base), "--output", str(tmp_path / "merged")]) == 1
    message = "is not an adapter folder: it has no adapter_config.json; give the folder that the run wrote"
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_failing_proof_exits_1_and_leaves_no_output(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", b_std=1e-4)
    assert main(["merge", str(adapter), "--output", str(tmp_path / "merged")]) == 1
    assert "merge with --dtype float32" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [adapter]
