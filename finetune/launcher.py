"""`accelerate launch`: its settings held against the recipe, and a start that ends without the launcher's traceback.

The recipe decides the arithmetic and the step. Settings of the launcher that would change them and that can be put back
are put back, which is said; a run that asks for sharding, or for more processes than were started, is refused.
"""

import os
import signal
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import Problem, RunError
from finetune.recipe import Recipe

_AUTOCAST = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
"""accelerate's name of what `model.dtype` asks for."""

_SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}
_WHOLE_MODEL = (
    "each process must hold the whole base: use accelerate_configs/multi_gpu.yaml or single_gpu.yaml (distributed_type "
    'MULTI_GPU or "NO")'
)
_STEP = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "training.global_batch_size",
    "ACCELERATE_GRADIENT_CLIPPING": "training.max_grad_norm",
}
_LOWERED = ("XLA_USE_BF16", "XLA_DOWNCAST_BF16", "ACCELERATE_DOWNCAST_BF16")


def check_launcher(recipe: Recipe, environment: MutableMapping[str, str]) -> list[str]:
    """Lines about the launcher's settings that the recipe overrides, which are changed in `environment`.

    Call it before accelerate reads the environment. Raises RunError for settings that cannot be overridden.
    """
    problems = _problems(environment)
    command = launch_command()
    if command is not None:
        problems = _command_problems(command, environment, problems)
    if problems:
        raise RunError(problems)
    dtype = recipe.model.dtype
    lines = [
        *_override(environment, "ACCELERATE_MIXED_PRECISION", _AUTOCAST[dtype], f"model.dtype {dtype}"),
        *_override(environment, "ACCELERATE_DYNAMO_BACKEND", "no", "the recipe, which has no compilation,"),
    ]
    for name, key in _STEP.items():
        if (value := environment.pop(name, None)) is not None:
            lines.append(_not_used(name, value, key))
    return lines


def _override(environment: MutableMapping[str, str], name: str, wanted: str, decides: str) -> list[str]:
    value = environment.get(name, "no").lower()
    environment[name] = wanted
    # Without autocast, which every file of accelerate_configs/ says, there is nothing to tell.
    return [] if value in (wanted, "no") else [_not_used(name, value, decides)]


def _not_used(name: str, value: str, decides: str) -> str:
    setting = name.removeprefix("ACCELERATE_").lower()
    return f"accelerate: {setting} {value} is not used: {decides} decides"


def _problems(environment: Mapping[str, str]) -> list[Problem]:
    problems = [_sharding(name) for variable, name in _SHARDING.items() if _is_true(environment.get(variable, "false"))]
    problems += [
        Problem("environment", f"{name} lowers the precision of all float32 values", f"unset {name}", got=value)
        for name in _LOWERED
        if _is_true(value := environment.get(name, "false"))
    ]
    return problems


def _sharding(name: str) -> Problem:
    return Problem("accelerate", f"{name} is not supported: it would split the base's 4-bit stacks", _WHOLE_MODEL)


def _is_true(value: str) -> bool:
    return value.lower() in ("1", "true", "yes", "on", "y", "t")


def launch_command(process: Any = None) -> list[str] | None:
    """Arguments of the `accelerate launch` that started this process, None where it was something else."""
    import psutil

    try:
        parent = (process or psutil.Process()).parent()
        words: list[str] = [] if parent is None else parent.cmdline()
    except psutil.Error:
        return None
    for number, word in enumerate(words[:4]):
        name = Path(word).name
        if name == "accelerate-launch" or word in ("accelerate.commands.launch", "finetune.launcher"):
            return words[number + 1 :]
        if name == "accelerate" and words[number + 1 : number + 2] == ["launch"]:
            return words[number + 2 :]
    return None


def _command_problems(
    command: Sequence[str], environment: Mapping[str, str], problems: Sequence[Problem]
) -> list[Problem]:
    """`problems`, and those of settings that the launcher drops on a CPU without passing them on."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    args = launch_command_parser().parse_args(list(command))
    config = None
    if args.config_file is not None or (Path(default_config_file).is_file() and not args.cpu):
        config = load_config_from_file(args.config_file)
    kind = str(getattr(config, "distributed_type", "NO")).rpartition(".")[2]
    asked = {
        "FSDP": args.use_fsdp or kind == "FSDP",
        "DeepSpeed": args.use_deepspeed or kind == "DEEPSPEED",
        "Megatron-LM": args.use_megatron_lm or kind == "MEGATRON_LM",
    }
    found = dict.fromkeys([*problems, *(_sharding(name) for name, wanted in asked.items() if wanted)])
    processes = args.num_processes or getattr(config, "num_processes", None) or 1
    started = int(environment.get("WORLD_SIZE", "1"))
    if not found and processes > started:
        what = f"{processes} processes were asked for and {started} started (accelerate starts one on a CPU)"
        do = f"use torchrun --nproc_per_node {processes}, or distributed_type: MULTI_GPU with use_cpu: true"
        found = {Problem("accelerate", what, do): None}
    return list(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m finetune.launcher ARGUMENTS`: `accelerate launch ARGUMENTS`, without its traceback.

    Processes print their own errors; the launcher adds a line only about one that a signal ended.
    """
    import logging

    from accelerate.commands.launch import launch_command as launch
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch(launch_command_parser().parse_args(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            do = "look for a memory limit or a person who ended it; what was saved is whole"
            print(Problem(f"process {rank}", f"was ended by {name}", do), file=sys.stderr)
            return 128 - failure.exitcode
        return int(failure.exitcode)
    return 0


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """The number of this process, 0 for the main one."""
    return int(environment.get("RANK", "0"))


if __name__ == "__main__":
    sys.exit(main())
