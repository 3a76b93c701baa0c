"""What the launcher asks for: its environment, completed by its command line, under accelerate's own names.

On a CPU accelerate hands little of its settings to the processes that it starts; its command line has them all.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from finetune.parallelism.plan import Parallelism
from finetune.upstream import private

ASKED_PROCESSES = "FINETUNE_ASKED_PROCESSES"
"""Not in any environment: the number of processes that the command line or its config file asks for."""

_KINDS = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
_SECTIONS = ("FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_")
_DEEPSPEED = {
    "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "deepspeed_config_file": "ACCELERATE_DEEPSPEED_CONFIG_FILE",
}
_TRUE = ("1", "true", "yes", "on", "y", "t")


def is_true(value: str | None) -> bool:
    """As accelerate reads a switch in the environment."""
    return value is not None and value.lower() in _TRUE


def uses(settings: Mapping[str, str], kind: str) -> bool:
    """Whether FSDP, DEEPSPEED, MEGATRON_LM or PARALLELISM_CONFIG is asked for."""
    return is_true(settings.get(f"ACCELERATE_USE_{kind}"))


def size_of(settings: Mapping[str, str], name: str) -> int:
    """One of accelerate's parallelism sizes, such as DP_SHARD; 1 where nothing is said."""
    value = settings.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1")
    return 1 if value in ("", "None") else int(value)


def processes_of(environment: Mapping[str, str]) -> int:
    """How many processes the launcher has started."""
    return int(environment.get("WORLD_SIZE", "1"))


def read_parallelism(environment: Mapping[str, str], command: Sequence[str] | None = None) -> Parallelism:
    """From the environment that the launcher made; `command`: its arguments where it was `accelerate launch`.

    FSDP means all processes together, or as many as accelerate's `dp_shard_size` says (HSDP).
    """
    return parallelism_of(launch_settings(environment, command))


def parallelism_of(settings: Mapping[str, str]) -> Parallelism:
    """As `read_parallelism`, from `launch_settings`."""
    processes = processes_of(settings)
    if not uses(settings, "FSDP"):
        return Parallelism(processes)
    return Parallelism(processes, size_of(settings, "DP_SHARD") if uses(settings, "PARALLELISM_CONFIG") else processes)


def launch_settings(environment: Mapping[str, str], command: Sequence[str] | None) -> dict[str, str]:
    """`environment`, and what `command` asked for that is not in it."""
    return {**({} if command is None else _asked(launch_arguments(command))), **environment}


def launch_arguments(command: Sequence[str]) -> Any:
    """The arguments of `accelerate launch` with what a config file adds; its warnings are left to the launch itself."""
    import logging

    from accelerate.commands.launch import launch_command_parser

    logger = logging.getLogger("accelerate.commands.launch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        validate = private("accelerate.commands.launch:_validate_launch_command")
        return validate(launch_command_parser().parse_args(list(command)))[0]
    finally:
        logger.setLevel(level)


def _asked(args: Any) -> dict[str, str]:
    """The arguments under the names that accelerate gives them in the environment."""
    asked = {f"ACCELERATE_USE_{kind}": "true" for kind in _KINDS if getattr(args, f"use_{kind.lower()}", False)}
    given = {name.upper(): str(value) for name, value in vars(args).items() if value is not None}
    asked |= {name: value for name, value in given.items() if name.startswith(_SECTIONS)}
    asked |= {ours: given[name.upper()] for name, ours in _DEEPSPEED.items() if name.upper() in given}
    if args.cpu or getattr(args, "use_cpu", False):
        asked["ACCELERATE_USE_CPU"] = "true"
    return {**asked, ASKED_PROCESSES: str(args.num_processes or 1)}


def hide_sharding(environment: MutableMapping[str, str], settings: Mapping[str, str]) -> None:
    """Leave accelerate, transformers and PEFT an environment as for DDP, on the device that was asked for.

    This package shards; with these variables the model would be loaded empty on all processes but the first, and
    accelerate would wrap it once more.
    """
    for name in [name for name in environment if name.startswith(_SECTIONS)]:
        del environment[name]
    for kind in ("FSDP", "PARALLELISM_CONFIG"):
        environment.pop(f"ACCELERATE_USE_{kind}", None)
    if is_true(settings.get("ACCELERATE_USE_CPU")):
        # Of several processes accelerate keeps it to itself, and they would train on the GPUs that they see.
        environment["ACCELERATE_USE_CPU"] = "true"
