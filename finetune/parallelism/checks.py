"""Settings of the launcher that would hang, train wrongly, or are not supported: refused before anything is loaded."""

from collections.abc import Iterator, Mapping
from typing import Any

from finetune.errors import Problem
from finetune.parallelism.settings import ASKED_PROCESSES, is_true, parallelism_of, processes_of, size_of, uses
from finetune.recipe import Recipe

_CONFIGS = "accelerate_configs"
_SIZE = "parallelism_config_dp_"  # of its keys in a config file
_FSDP2 = f"use {_CONFIGS}/fsdp2.yaml"
_LOWERED = ("XLA_USE_BF16", "XLA_DOWNCAST_BF16", "ACCELERATE_DOWNCAST_BF16")
_STARTED_BY_OTHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")

_PARALLEL = {
    "TP": ("tensor parallelism", "it would cut the 4-bit matrices at other places than their blocks"),
    "CP": ("context parallelism", "it drops the attention masks: with data.packing rows would attend to each other"),
    "SP": ("sequence parallelism", "its attention takes no masks: with data.packing rows would attend to each other"),
}
SHARDED_OPTIMIZERS = (
    *("adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("adagrad", "rmsprop", "sgd", "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
    *("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"),
    *("rmsprop_bnb", "rmsprop_bnb_32bit", "rmsprop_bnb_8bit"),
)
"""Optimizers that are tested on the parts of a sharded model; adafactor, for one, mixes them with whole tensors."""

_SHARD_ALL = ("FULL_SHARD", "1", "NONE", "")

NOT_USED = {
    "FSDP_RESHARD_AFTER_FORWARD": (("true", "FULL_SHARD"), "a layer is given back after its forward, always"),
    "FSDP_STATE_DICT_TYPE": (("SHARDED_STATE_DICT",), "checkpoints and the adapter have this program's own formats"),
    "FSDP_AUTO_WRAP_POLICY": (("TRANSFORMER_BASED_WRAP",), "every decoder layer is sharded on its own"),
    "FSDP_ACTIVATION_CHECKPOINTING": (("false",), "training.gradient_checkpointing decides"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (("false",), "training.gradient_checkpointing decides"),
    "FSDP_IGNORED_MODULES": ((), "every decoder layer is sharded on its own"),
}
"""Settings of FSDP that change memory or speed and no result: the values that are as here, and what is done instead."""


def launch_problems(recipe: Recipe, settings: Mapping[str, str], gpus: int) -> list[Problem]:
    """What cannot be run of `settings` (from `launch_settings`). `gpus`: how many this process sees."""
    problems = [
        *_lowered_precision(settings),
        *_without_launcher(settings),
        *_other_engines(recipe, settings),
        *_not_started(settings),
    ]
    if not problems and gpus and not is_true(settings.get("ACCELERATE_USE_CPU")):
        problems += _too_many_for(settings, gpus)
    if uses(settings, "PARALLELISM_CONFIG"):
        problems += _parallel_sizes(settings)
    if uses(settings, "FSDP"):
        problems += _fsdp(settings)
        # Sizes that are no numbers are among the problems.
        if not problems and parallelism_of(settings).is_sharded:
            problems += _not_sharded(recipe)
    return problems


def _not_sharded(recipe: Recipe) -> Iterator[Problem]:
    """What a sharded model cannot be trained with."""
    if recipe.model.dtype == "float16":
        what = "float16 needs a gradient scaler, which would scale each process's part on its own"
        yield Problem("model.dtype", what, "write bfloat16, or float32 for GPUs without it", "float16")
    if recipe.training.optim not in SHARDED_OPTIMIZERS:
        what = "this optimizer is not known to take the same steps on parts of a matrix"
        yield Problem("training.optim", what, f"write one of {', '.join(SHARDED_OPTIMIZERS)}", recipe.training.optim)


def fsdp_remarks(settings: Mapping[str, str]) -> list[str]:
    """Lines about settings of FSDP that are not used, because something else is done here."""
    if not uses(settings, "FSDP"):
        return []
    return [
        f"accelerate: {name.lower()} {value} is not used: {instead}"
        for name, (as_here, instead) in NOT_USED.items()
        if (value := settings.get(name, "None")) not in ("", "None") and value.lower() not in map(str.lower, as_here)
    ]


def _lowered_precision(settings: Mapping[str, str]) -> Iterator[Problem]:
    for name in _LOWERED:
        if is_true(value := settings.get(name)):
            yield Problem("environment", f"{name} lowers the precision of all float32 values", f"unset {name}", value)


def _without_launcher(settings: Mapping[str, str]) -> Iterator[Problem]:
    """Processes of `srun` or `mpirun` alone know nothing of each other: each would train a whole run."""
    known = "WORLD_SIZE" in settings
    if known and (processes_of(settings) == 1 or "LOCAL_RANK" in settings):
        return
    for name in ("WORLD_SIZE",) if known else _STARTED_BY_OTHERS:
        if (value := settings.get(name, "1")).isdigit() and int(value) > 1:
            what = "several processes were started without torchrun or accelerate launch; each would train by itself"
            do = f"start one of these a machine ({_CONFIGS}/clusters/), or unset {name} where the runs are independent"
            yield Problem("launcher", what, do, got=f"{name}={value}")
            return


def engine_problem(args: Any) -> Problem | None:
    """Of the arguments of `accelerate launch`: an engine that no recipe can use, which may not even be installed."""
    if not getattr(args, "use_deepspeed", False):
        return None
    what = "DeepSpeed is not supported: it cannot divide 4-bit weights (DeepSpeed#5819), and checkpoints of a run would"
    return Problem("accelerate", f"{what} miss its optimizer's state", f"{_FSDP2}, which divides both")


def _other_engines(recipe: Recipe, settings: Mapping[str, str]) -> Iterator[Problem]:
    if uses(settings, "MEGATRON_LM"):
        yield Problem("accelerate", "Megatron-LM is not supported: it has its own models and optimizers", _FSDP2)
    if not uses(settings, "DEEPSPEED"):
        return
    stage = settings.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    name = f"DeepSpeed ZeRO-{stage}" if stage.isdigit() else "DeepSpeed"
    if recipe.model.load_in_4bit:
        what = f"{name} is not supported with load_in_4bit: it cannot divide 4-bit weights (DeepSpeed#5819)"
    else:
        # Its engine steps in the backward pass, and every process has a part of the optimizer's state of its own.
        what = f"{name} is not supported: it takes the step before its gradient is looked at, and checkpoints of a run"
        what += " would miss its optimizer's state"
    yield Problem("accelerate", what, f"{_FSDP2}, which divides base, adapter and optimizer state")


def _not_started(settings: Mapping[str, str]) -> Iterator[Problem]:
    """accelerate starts one process on a CPU, whatever number is asked for, unless it takes the way of several GPUs."""
    asked, started = int(settings.get(ASKED_PROCESSES, "1")), processes_of(settings)
    if asked > started:
        what = f"{asked} processes were asked for and {started} started (accelerate starts one with --cpu, cpu.yaml)"
        do = f"use {_CONFIGS}/cpu_ddp.yaml, or fsdp2.yaml to shard, with --num_processes {asked} and without --cpu"
        yield Problem("accelerate", what, do)


def _too_many_for(settings: Mapping[str, str], gpus: int) -> Iterator[Problem]:
    """Two processes on one GPU: NCCL ends them with an error that does not say so, once the base is loaded."""
    here = int(settings.get("LOCAL_WORLD_SIZE", "1"))
    if here > gpus:
        do = f"start {gpus} on this machine (--num_processes counts all machines), or show it more GPUs"
        yield Problem("launcher", f"{here} processes on a machine with fewer GPUs", do, got=f"{gpus} GPUs")


def _parallel_sizes(settings: Mapping[str, str]) -> Iterator[Problem]:
    try:
        sizes = {name: size_of(settings, name) for name in ("DP_REPLICATE", "DP_SHARD", *_PARALLEL)}
    except ValueError as error:
        yield Problem("accelerate", "a size of parallelism_config is no number", "write whole numbers", str(error))
        return
    others = [name for name in _PARALLEL if sizes[name] > 1]
    for name in others:
        title, why = _PARALLEL[name]
        do = f"write parallelism_config_{name.lower()}_size: 1, or remove it"
        yield Problem("accelerate", f"{title} is not supported: {why}", do, got=f"{name.lower()}_size {sizes[name]}")
    if not others:
        yield from _shard_sizes(sizes["DP_REPLICATE"], sizes["DP_SHARD"], settings)


def _shard_sizes(replicate: int, shard: int, settings: Mapping[str, str]) -> Iterator[Problem]:
    processes = processes_of(settings)
    if shard > 1 and not uses(settings, "FSDP"):
        do = f"write distributed_type: FSDP and fsdp_version: 2, as {_CONFIGS}/hsdp.yaml does"
        yield Problem("accelerate", "dp_shard_size without FSDP shards nothing", do, got=str(shard))
    elif replicate * shard != processes or min(replicate, shard) < 1:
        what = f"dp_replicate_size x dp_shard_size is not the number of processes, {processes}"
        sizes = f"{_SIZE}replicate_size: {processes // shard} with {_SIZE}shard_size: {shard}"
        if shard < 1 or processes % shard:
            sizes = f"{_SIZE}replicate_size: 1 with {_SIZE}shard_size: {processes}"
        do = f"write {sizes}" + (f", or --num_processes {replicate * shard}" if replicate * shard > 0 else "")
        yield Problem("accelerate", what, do, got=f"{replicate} x {shard}")


def _fsdp(settings: Mapping[str, str]) -> Iterator[Problem]:
    version, strategy = settings.get("FSDP_VERSION", "1"), settings.get("FSDP_SHARDING_STRATEGY", "None")
    if version != "2":
        what = f"FSDP version {version} is not supported: it keeps 4-bit weights dense"
        yield Problem("accelerate", what, f"write fsdp_version: 2 in fsdp_config (--fsdp_version 2), or {_FSDP2}")
    elif strategy.upper() not in _SHARD_ALL:
        do = f"remove it; {_CONFIGS}/hsdp.yaml shards within each machine, ddp.yaml not at all"
        yield Problem("accelerate", "fsdp_sharding_strategy is a setting of FSDP version 1", do, got=strategy)
    if is_true(settings.get("FSDP_OFFLOAD_PARAMS")):
        what = "fsdp_offload_params is not supported: 4-bit layers are computed where their bytes are"
        yield Problem("accelerate", what, "write fsdp_offload_params: false, and shard over more GPUs")
