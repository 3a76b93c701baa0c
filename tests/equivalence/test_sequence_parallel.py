"""The prototype of sequence parallelism: a packed row cut over two processes gives the gradients of one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.faults  # two processes that import everything, for what is not part of the product
def test_a_packed_row_over_two_processes_is_that_of_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "benchmarks.sequence_parallel", "--output", str(tmp_path / "result.json")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["processes"] == 2
    assert [case["key_heads"] for case in result["cases"]] == [4, 2, 1]
    for case in result["cases"]:
        assert case["tensors"] == 24
        assert max(case["loss"], case["gradients"]) < 1e-5
