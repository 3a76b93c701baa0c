"""`finetune train`: the recipe is checked first, then accelerate's launcher takes the process over."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.cli.train import default_config_files, launch_flags
from finetune.run import read_metrics
from tests.support import save_tiny_mixtral


def test_a_config_file_is_handed_on_and_nothing_is_added(tmp_path: Path) -> None:
    assert launch_flags(tmp_path / "c.yaml", {}) == (["--config_file", str(tmp_path / "c.yaml")], {})


@pytest.mark.parametrize("name", ["default_config.yaml", "default_config.json"])
def test_accelerates_default_config_is_respected(tmp_path: Path, name: str) -> None:
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / name).write_text("")
    assert launch_flags(None, {"HF_HOME": str(tmp_path)}) == ([], {})


def test_the_default_config_is_looked_for_where_accelerate_does() -> None:
    from accelerate.commands.config.config_args import cache_dir, default_yaml_config_file

    expected = [default_yaml_config_file, f"{cache_dir}/default_config.json"]
    assert [str(path) for path in default_config_files(os.environ)] == expected


@pytest.mark.parametrize(
    ("environment", "threads", "gpu"),
    [({"OMP_NUM_THREADS": "3"}, "3", "0"), ({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "5,6"}, "1", "5")],
)
def test_without_any_config_one_process_gets_one_gpu_and_the_cores(
    tmp_path: Path, environment: dict[str, str], threads: str, gpu: str
) -> None:
    flags, changes = launch_flags(None, {"HF_HOME": str(tmp_path), **environment})
    assert dict(zip(flags[::2], flags[1::2], strict=True)) == {
        "--num_processes": "1",
        "--num_machines": "1",
        "--mixed_precision": "no",
        "--dynamo_backend": "no",
        "--num_cpu_threads_per_process": threads,
    }
    assert changes == {"CUDA_VISIBLE_DEVICES": gpu}


def recipe_for(model: Path, folder: Path, **changes: Any) -> Path:
    rows = [{"messages": [{"role": "user", "content": "light?"}, {"role": "assistant", "content": "on"}]}] * 4
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(model), "load_in_4bit": True, "dtype": "float32"},
        "lora": {"targets": ["attention", "experts"], "r": 2, "lora_alpha": 4},
        "router": {"router_aux_loss_coef": 0.01},
        "method": {"kind": "sft"},
        "data": {"train": {"path": str(folder / "rows.jsonl"), "format": "messages"}, "max_length": 64},
        "training": {"max_steps": 2, "learning_rate": 1e-3, "global_batch_size": 2},
        "logging": {"report_to": "none"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, **changes}))
    return path


def finetune_train(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "finetune.cli.main", "train", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_wrong_recipe_or_override_exits_2_before_anything_is_launched(tmp_path: Path) -> None:
    done = finetune_train(recipe_for(tmp_path, tmp_path), "lora.rank=8")
    assert done.returncode == 2
    assert "lora.rank" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_accelerate_config_exits_2_and_says_where_they_are(tmp_path: Path) -> None:
    done = finetune_train(recipe_for(tmp_path, tmp_path), "--config_file", "nowhere.yaml")
    assert done.returncode == 2
    assert "no such file: nowhere.yaml; accelerate_configs/ holds one a kind of machine" in done.stderr


def test_several_processes_need_a_config_that_says_what_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    done = finetune_train(recipe_for(tmp_path, tmp_path), "--num_processes", "2")
    assert done.returncode == 2
    assert done.stderr == (
        "command line: without a config of accelerate a run has one process; got --num_processes=2; add --config_file, "
        "such as accelerate_configs/fsdp2.yaml, ddp.yaml or cpu_ddp.yaml\n"
    )


def test_machines_that_do_not_know_the_first_one_are_refused(tmp_path: Path) -> None:
    """accelerate would look for a machine of the name None until its time is up."""
    config = Path(__file__).parents[2] / "accelerate_configs" / "hsdp.yaml"
    done = finetune_train(recipe_for(tmp_path, tmp_path), "--config_file", config)
    assert done.returncode == 1
    assert done.stderr == (
        "accelerate: 2 machines and no address of the first; add --main_process_ip HOST, the address of machine 0, and "
        "--machine_rank R, the number of this machine\n"
    )


def test_deepspeed_is_refused_before_its_package_is_asked_for(tmp_path: Path) -> None:
    config = tmp_path / "zero3.yaml"
    config.write_text("distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {zero_stage: 3}\n")
    done = finetune_train(recipe_for(tmp_path, tmp_path), "--config_file", config)
    assert done.returncode == 1
    assert done.stderr == (
        "accelerate: DeepSpeed is not supported: it cannot divide 4-bit weights (DeepSpeed#5819), and checkpoints of a "
        "run would miss its optimizer's state; use accelerate_configs/fsdp2.yaml, which divides both\n"
    )


def test_a_run_that_fails_hands_its_exit_code_on_without_the_launchers_traceback(tmp_path: Path) -> None:
    done = finetune_train(recipe_for(tmp_path / "no-model", tmp_path))
    assert done.returncode == 1
    assert "no-model" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_run_leaves_the_whole_run_folder(tmp_path: Path) -> None:
    recipe = recipe_for(save_tiny_mixtral(tmp_path / "model"), tmp_path)
    config = Path(__file__).parents[2] / "accelerate_configs" / "cpu.yaml"
    done = finetune_train(recipe, "training.max_steps=3", "training.save_steps=1000", "--config_file", config)
    assert done.returncode == 0, done.stderr
    remark = "training.save_steps: 1,000 of a run of 3 steps: there is no checkpoint before the end"
    assert done.stdout.splitlines().count(remark) == 1

    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert names >= {"adapter", "recipe.yaml", "audit.json", "metrics.jsonl", "provenance.json", "loss_curve.png"}
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    logged = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in logged] == [1, 2, 3]
    assert logged[0].keys() >= {"ce_loss", "balance_loss", "epoch"}
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["base"]["fingerprint"]
    assert "training.max_steps=3" in provenance["command_line"]
    assert yaml.safe_load((run / "recipe.yaml").read_text())["training"]["max_steps"] == 3
