"""`accelerate launch` itself, on a machine without a GPU: how many processes start, and what accelerate then does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.test_run_command import recipe_for

CONFIGS = Path(__file__).resolve().parents[2] / "accelerate_configs"
ACCELERATE = str(Path(sys.executable).with_name("accelerate"))

# What a run does first, and then what a trainer would: its arguments and an Accelerator.
PROBE = """
import json, os, sys
from pathlib import Path
from finetune.launcher import check_launcher
from finetune.recipe import load_recipe
from finetune.train import _first_line, _processes
recipe = load_recipe(Path(sys.argv[1]), [])
parallelism, remarks = check_launcher(recipe, os.environ)
state = _processes(recipe.training.rank_timeout)
line = _first_line(parallelism, state)
from transformers import TrainingArguments
from transformers.distributed.fsdp import is_fsdp_enabled
arguments = TrainingArguments(output_dir=sys.argv[2], use_cpu=True, report_to=[])
from accelerate import Accelerator
accelerator = Accelerator()
seen = {
    "rank": state.process_index, "processes": [parallelism.processes, state.num_processes, arguments.world_size],
    "shard": parallelism.shard, "line": line, "remarks": remarks, "type": accelerator.distributed_type.value,
    "parallelism_config": str(accelerator.parallelism_config), "mixed_precision": accelerator.mixed_precision,
    "fsdp": [is_fsdp_enabled(), getattr(accelerator.state, "fsdp_plugin", None) is not None],
}
Path(sys.argv[2], f"{state.process_index}.json").write_text(json.dumps(seen))
"""


def launch(config: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [ACCELERATE, "launch", "--config_file", str(CONFIGS / config), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def recipe(folder: Path) -> Path:
    path = recipe_for(folder / "no-model", folder)
    assert yaml.safe_load(path.read_text())["model"]["dtype"] == "float32"
    return path


@pytest.mark.slow
def test_a_file_that_shards_starts_its_processes_on_a_cpu_and_accelerate_sees_none_of_it(tmp_path: Path) -> None:
    """The settings of hsdp.yaml, which are those of fsdp2.yaml and more, on one machine."""
    (tmp_path / "probe.py").write_text(PROBE)
    sizes = ["--parallelism_config_dp_replicate_size", 1, "--parallelism_config_dp_shard_size", 2]
    flags = ["--num_machines", 1, "--num_processes", 2, "--main_process_port", 0, "--mixed_precision", "bf16", *sizes]
    done = launch("hsdp.yaml", *flags, tmp_path / "probe.py", recipe(tmp_path), tmp_path)
    assert done.returncode == 0, done.stderr
    seen: list[dict[str, Any]] = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [one.pop("rank") for one in seen] == [0, 1]
    assert seen[0] == seen[1]
    assert seen[0]["processes"] == [2, 2, 2]
    assert seen[0]["shard"] == 2
    assert seen[0]["line"] == "2 processes on 1 machine, cpu, FSDP2 over 2"
    assert seen[0]["remarks"] == ["accelerate: mixed_precision bf16 is not used: model.dtype float32 decides"]
    assert (seen[0]["type"], seen[0]["parallelism_config"]) == ("MULTI_CPU", "None")
    assert (seen[0]["mixed_precision"], seen[0]["fsdp"]) == ("no", [False, False])


@pytest.mark.slow
def test_processes_that_were_not_started_are_refused_and_the_advice_starts_them(tmp_path: Path) -> None:
    done = launch("cpu.yaml", "--num_processes", 2, "-m", "finetune.train", recipe(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(
        "accelerate: 2 processes were asked for and 1 started (accelerate starts one with --cpu, cpu.yaml); use "
        "accelerate_configs/cpu_ddp.yaml, or fsdp2.yaml to shard, with --num_processes 2 and without --cpu\n"
    )
    (tmp_path / "count.py").write_text("import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'])")
    done = launch("cpu_ddp.yaml", "--num_processes", 2, "--main_process_port", 0, tmp_path / "count.py")
    assert sorted(done.stdout.splitlines()) == ["0 2", "1 2"], done.stderr
