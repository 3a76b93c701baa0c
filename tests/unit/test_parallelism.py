"""How processes divide the work, read from what the launcher was asked for, and what of it is refused.

Each refusal is followed: what it says to write instead is accepted.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.errors import RunError
from finetune.launcher import check_launcher
from finetune.parallelism import Parallelism, first_line, launch_arguments, read_parallelism
from finetune.recipe import Recipe
from tests.unit.test_model import recipe_for

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
TWO = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
FOUR = {**TWO, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
WHOLE = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "machine_rank": 0, "mixed_precision": "no"}


def hsdp(replicate: int, shard: int, **sizes: int) -> dict[str, str]:
    """What accelerate writes for its parallelism settings."""
    sizes = {"dp_replicate": replicate, "dp_shard": shard, "tp": 1, "cp": 1, "sp": 1, **sizes}
    named = {f"PARALLELISM_CONFIG_{name.upper()}_SIZE": str(size) for name, size in sizes.items()}
    return {**FSDP2, "ACCELERATE_USE_PARALLELISM_CONFIG": "true", **named}


def with_model(recipe: Recipe, **model: Any) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=model)})


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.launcher.launch_command", lambda: None)


@pytest.mark.parametrize(
    ("environment", "wanted", "strategy"),
    [
        ({}, Parallelism(1, 1), "one process"),
        (TWO, Parallelism(2, 1), "DDP"),
        ({**FOUR, **FSDP2}, Parallelism(4, 4), "FSDP2 over 4"),
        ({**FOUR, **hsdp(2, 2)}, Parallelism(4, 2), "FSDP2 over 2 in 2 replicas (HSDP)"),
        ({**FOUR, **hsdp(1, 4)}, Parallelism(4, 4), "FSDP2 over 4"),
        ({**FOUR, **hsdp(4, 1)}, Parallelism(4, 1), "DDP"),
        (FSDP2, Parallelism(1, 1), "one process"),
        ({**TWO, "ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"}, Parallelism(2, 1), "DDP"),
    ],
)
def test_the_environment_says_how_the_work_is_divided(
    tmp_path: Path, environment: dict[str, str], wanted: Parallelism, strategy: str
) -> None:
    assert read_parallelism(environment) == wanted
    assert wanted.strategy == strategy
    assert wanted.replicate * wanted.shard == wanted.processes
    changed = dict(environment)
    assert check_launcher(recipe_for(tmp_path), changed) == (wanted, [])
    left = {name for name in changed if name.startswith(("FSDP_", "PARALLELISM_CONFIG_", "ACCELERATE_USE_"))}
    assert left <= {"ACCELERATE_USE_FSDP"}, "accelerate, transformers and PEFT would read them"
    assert changed.get("ACCELERATE_USE_FSDP", "false") == "false"


def test_the_first_line_counts_processes_and_machines() -> None:
    assert first_line(Parallelism(), ["a"], "cpu") == "1 process on 1 machine, cpu"
    assert first_line(Parallelism(2, 1), ["a", "a"], "cpu") == "2 processes on 1 machine, cpu, DDP"
    line = first_line(Parallelism(4, 2), ["a", "a", "b", "b"], "cuda (NVIDIA H200)")
    assert line == "4 processes on 2 machines, cuda (NVIDIA H200), FSDP2 over 2 in 2 replicas (HSDP)"


@pytest.mark.parametrize(
    ("environment", "message", "advised"),
    [
        (
            {**TWO, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
            "accelerate: FSDP version 1 is not supported: .*; write fsdp_version: 2 in fsdp_config",
            {"FSDP_VERSION": "2"},
        ),
        ({**TWO, "ACCELERATE_USE_FSDP": "true"}, "accelerate: FSDP version 1 is not supported", {"FSDP_VERSION": "2"}),
        (
            {**TWO, **FSDP2, "FSDP_OFFLOAD_PARAMS": "true"},
            "accelerate: fsdp_offload_params is not supported: .*; write fsdp_offload_params: false",
            {"FSDP_OFFLOAD_PARAMS": "false"},
        ),
        (
            {**TWO, **FSDP2, "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"},
            "accelerate: fsdp_sharding_strategy is a setting of FSDP version 1; got HYBRID_SHARD; remove it; .*hsdp.ya",
            {"FSDP_SHARDING_STRATEGY": "FULL_SHARD"},
        ),
        (
            {**FOUR, **hsdp(2, 1)},
            "accelerate: dp_replicate_size x dp_shard_size is not the number of processes, 4; got 2 x 1; write "
            "parallelism_config_dp_replicate_size: 4 with parallelism_config_dp_shard_size: 1, or --num_processes 2",
            hsdp(4, 1),
        ),
        (
            {**FOUR, **hsdp(2, 3)},
            ".* got 2 x 3; write parallelism_config_dp_replicate_size: 1 with parallelism_config_dp_shard_size: 4, or "
            "--num_processes 6",
            hsdp(1, 4),
        ),
        (
            {**FOUR, **hsdp(2, 2), "ACCELERATE_USE_FSDP": "false"},
            "accelerate: dp_shard_size without FSDP shards nothing; got 2; write distributed_type: FSDP and fsdp_",
            FSDP2,
        ),
        (
            {**FOUR, **hsdp(1, 2, cp=2)},
            "accelerate: context parallelism is not supported: it drops the attention masks: with data.packing rows "
            "would attend to each other; got cp_size 2; write parallelism_config_cp_size: 1, or remove it",
            hsdp(1, 4),
        ),
        ({**FOUR, **hsdp(2, 1, tp=2)}, "accelerate: tensor parallelism is not supported: .* got tp_size 2", hsdp(4, 1)),
        ({**FOUR, **hsdp(2, 1, sp=2)}, "accelerate: sequence parallelism is not supported", hsdp(4, 1)),
        (
            {**FOUR, **hsdp(1, 4), "PARALLELISM_CONFIG_DP_SHARD_SIZE": "all"},
            "accelerate: a size of parallelism_config is no number; got .*'all'; write whole numbers",
            hsdp(1, 4),
        ),
        (
            {**TWO, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            r"accelerate: DeepSpeed ZeRO-3 is not supported with load_in_4bit: it cannot divide 4-bit weights "
            r"\(DeepSpeed#5819\); use accelerate_configs/fsdp2.yaml, which divides base",
            {"ACCELERATE_USE_DEEPSPEED": "false", **FSDP2},
        ),
        (
            {**TWO, "ACCELERATE_USE_MEGATRON_LM": "True"},
            "accelerate: Megatron-LM is not supported: .*; use accelerate_configs/fsdp2.yaml",
            {"ACCELERATE_USE_MEGATRON_LM": "False", **FSDP2},
        ),
        (
            {"XLA_USE_BF16": "1"},
            "environment: XLA_USE_BF16 lowers the precision of .*; got 1; unset XLA_USE_BF16",
            {"XLA_USE_BF16": "0"},
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "8"},
            "launcher: several processes were started without torchrun or .*; got SLURM_STEP_NUM_TASKS=8; start one ",
            {"SLURM_STEP_NUM_TASKS": "1"},
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "launcher: several processes were started .* got OMPI_COMM_WORLD_SIZE=2", TWO),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "launcher: several processes were started .* got WORLD_SIZE=2", TWO),
    ],
)
def test_what_would_hang_or_train_wrongly_is_refused_with_what_to_write(
    tmp_path: Path, environment: dict[str, str], message: str, advised: dict[str, str]
) -> None:
    with pytest.raises(RunError, match=f"^{message}") as caught:
        check_launcher(recipe_for(tmp_path), dict(environment))
    assert len(caught.value.problems) == 1
    check_launcher(recipe_for(tmp_path), {**environment, **advised})


def test_deepspeed_is_refused_for_a_base_that_is_not_in_4_bits_as_well(tmp_path: Path) -> None:
    recipe = with_model(recipe_for(tmp_path), load_in_4bit=False, dtype="bfloat16")
    message = "accelerate: DeepSpeed ZeRO-2 is not supported: it takes the step before its gradient is looked at"
    with pytest.raises(RunError, match=message):
        check_launcher(recipe, {**TWO, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"})
    assert check_launcher(recipe, {**TWO, **FSDP2})[0] == Parallelism(2, 2)


def test_float16_is_refused_where_the_model_is_sharded(tmp_path: Path) -> None:
    recipe = with_model(recipe_for(tmp_path), dtype="float16")
    with pytest.raises(RunError, match=r"^model.dtype: float16 needs a gradient scaler.*; got float16; write bfloat16"):
        check_launcher(recipe, {**TWO, **FSDP2})
    check_launcher(with_model(recipe, dtype="bfloat16"), {**TWO, **FSDP2})
    check_launcher(recipe, dict(TWO))
    check_launcher(recipe, dict(FSDP2))


def test_more_processes_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would end them with an error that does not say so, once the base is loaded."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(RunError, match=r"^launcher: 4 processes on a machine with fewer GPUs; got 2 GPUs; start 2 on"):
        check_launcher(recipe_for(tmp_path), {**FOUR, **FSDP2})
    check_launcher(recipe_for(tmp_path), {**TWO, **FSDP2})
    check_launcher(recipe_for(tmp_path), {**FOUR, **FSDP2, "ACCELERATE_USE_CPU": "true"})


def test_settings_of_fsdp_that_change_no_result_are_said_and_not_used(tmp_path: Path) -> None:
    as_accelerate_writes_it = {
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    }
    environment = {**TWO, **FSDP2, **as_accelerate_writes_it}
    assert check_launcher(recipe_for(tmp_path), dict(environment))[1] == []
    others = {"FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_ACTIVATION_CHECKPOINTING": "true"}
    assert check_launcher(recipe_for(tmp_path), {**environment, **others})[1] == [
        "accelerate: fsdp_reshard_after_forward false is not used: a layer is given back after its forward, always",
        "accelerate: fsdp_activation_checkpointing true is not used: training.gradient_checkpointing decides",
    ]


@pytest.mark.parametrize(
    ("flags", "config", "message"),
    [
        (
            ["--cpu"],
            {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_version": 2}},
            "2 processes",
        ),
        (
            ["--cpu"],
            {"distributed_type": "DEEPSPEED", "num_processes": 1},
            "DeepSpeed is not supported with load_in_4bit",
        ),
        (["--cpu"], {"distributed_type": "MEGATRON_LM", "num_processes": 1}, "Megatron-LM is not supported"),
        (["--use_fsdp"], None, "FSDP version 1 is not supported"),
        (["--use_fsdp", "--fsdp_version", "2", "--fsdp_offload_params", "true"], None, "fsdp_offload_params is not su"),
        (["--cpu", "--num_processes", "2"], None, "2 processes were asked for and 1 started .*; use .*/cpu_ddp.yaml"),
        (
            ["--num_processes=3"],
            {"distributed_type": "NO", "num_processes": 1},
            "3 processes were asked for and 1 started",
        ),
        ([], {"distributed_type": "MULTI_CPU", "num_processes": 4}, "4 processes were asked for and 1 started"),
    ],
)
def test_what_the_launcher_drops_on_a_cpu_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    config: dict[str, object] | None,
    message: str,
) -> None:
    monkeypatch.setattr("finetune.launcher.launch_command", lambda: command(tmp_path, flags, config))
    with pytest.raises(RunError, match=f"^accelerate: {message}") as caught:
        check_launcher(recipe_for(tmp_path), {})
    assert len(caught.value.problems) == 1


def command(folder: Path, flags: list[str], config: dict[str, object] | None) -> list[str]:
    """Arguments of `accelerate launch`, with a config file if there is one."""
    if config is not None:
        (folder / "accelerate.yaml").write_text(yaml.safe_dump({**WHOLE, "use_cpu": True, **config}))
        flags = ["--config_file", str(folder / "accelerate.yaml"), *flags]
    return [*flags, "-m", "finetune.train", "r.yaml"]


def test_use_cpu_is_obeyed_by_several_processes_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate keeps it to itself with distributed_type MULTI_GPU, and they would train on the GPUs that they see."""
    config = {"distributed_type": "MULTI_GPU", "num_processes": 2}
    monkeypatch.setattr("finetune.launcher.launch_command", lambda: command(tmp_path, [], config))
    environment = dict(TWO)
    check_launcher(recipe_for(tmp_path), environment)
    assert environment["ACCELERATE_USE_CPU"] == "true"


SHIPPED = {
    "cpu": Parallelism(1, 1),
    "cpu_ddp": Parallelism(2, 1),
    "single_gpu": Parallelism(1, 1),
    "ddp": Parallelism(8, 1),
    "fsdp2": Parallelism(8, 8),
    "hsdp": Parallelism(16, 8),
    "multi_node_fsdp2": Parallelism(16, 16),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_shipped_config_divides_the_work_as_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    arguments = ["--config_file", str(path), "--main_process_ip", "node-0", "-m", "finetune.train", "r.yaml"]
    wanted = SHIPPED[path.stem]
    started = {**TWO, "WORLD_SIZE": str(wanted.processes)} if wanted.processes > 1 else {}
    assert launch_arguments(arguments).num_processes == wanted.processes
    assert read_parallelism(started, arguments) == wanted
    monkeypatch.setattr("finetune.launcher.launch_command", lambda: arguments)
    assert check_launcher(recipe_for(tmp_path), started) == (wanted, [])
    assert path.read_text().startswith("# "), "when to use it"


def test_every_shipped_config_is_known_here() -> None:
    assert {path.stem for path in CONFIGS} == SHIPPED.keys()
