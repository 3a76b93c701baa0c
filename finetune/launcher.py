"""`accelerate launch`: its settings held against the recipe, and a start that hands signals on to what it started.

The recipe decides the arithmetic and the step. Settings of the launcher that would change them and that can be put back
are put back, which is said; the others are refused. What it says of sharding is read and hidden from accelerate.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from finetune.environment import memory_kills
from finetune.errors import Problem, RunError
from finetune.parallelism import (
    Parallelism,
    engine_problem,
    fsdp_remarks,
    hide_sharding,
    launch_arguments,
    launch_problems,
    launch_settings,
    parallelism_of,
)
from finetune.progress import ended_line, shared_by, shared_file
from finetune.recipe import Recipe
from finetune.stopping import EXIT_CODES, Interrupted, held, stop

_MEMORY_KILLS = memory_kills()  # before any process of the run
_REPLACED = "FINETUNE_LAUNCHER"
"""Environment variable: pid and arguments of a launcher that the training process has replaced."""

_SECONDS_BETWEEN_SIGNALS = 5

_AUTOCAST = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
"""accelerate's name of what `model.dtype` asks for."""

_STEP = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "training.global_batch_size",
    "ACCELERATE_GRADIENT_CLIPPING": "training.max_grad_norm",
}


def check_launcher(recipe: Recipe, environment: MutableMapping[str, str]) -> tuple[Parallelism, list[str]]:
    """How the processes divide the work, and lines about settings that the recipe overrides.

    `environment` is changed: accelerate is to start as for DDP, for what is sharded is sharded by this package. Call it
    before accelerate reads the environment. Raises RunError for settings that cannot be overridden.
    """
    from torch.cuda import device_count

    settings = launch_settings(environment, launch_command())
    if problems := launch_problems(recipe, settings, device_count()):
        raise RunError(problems)
    hide_sharding(environment, settings)
    dtype = recipe.model.dtype
    lines = [
        *_override(environment, "ACCELERATE_MIXED_PRECISION", _AUTOCAST[dtype], f"model.dtype {dtype}"),
        *_override(environment, "ACCELERATE_DYNAMO_BACKEND", "no", "the recipe, which has no compilation,"),
    ]
    for name, key in _STEP.items():
        if (value := environment.pop(name, None)) is not None:
            lines.append(_not_used(name, value, key))
    return parallelism_of(settings), [*lines, *fsdp_remarks(settings)]


def _override(environment: MutableMapping[str, str], name: str, wanted: str, decides: str) -> list[str]:
    value = environment.get(name, "no").lower()
    environment[name] = wanted
    # Without autocast, which every file of accelerate_configs/ says, there is nothing to tell.
    return [] if value in (wanted, "no") else [_not_used(name, value, decides)]


def _not_used(name: str, value: str, decides: str) -> str:
    setting = name.removeprefix("ACCELERATE_").lower()
    return f"accelerate: {setting} {value} is not used: {decides} decides"


def launch_command(process: Any = None) -> list[str] | None:
    """Arguments of the `accelerate launch` that started this process, None where it was something else."""
    import psutil

    number, arguments = json.loads(os.environ.get(_REPLACED, "[0, []]"))
    if process is None and number == os.getpid():
        return list(arguments)
    try:
        parent = (process or psutil.Process()).parent()
        words: list[str] = [] if parent is None else parent.cmdline()
    except psutil.Error:
        return None
    return _launch_arguments(words)


def _launch_arguments(words: Sequence[str]) -> list[str] | None:
    for number, word in enumerate(words[:4]):
        name = Path(word).name
        if name == "accelerate-launch" or word in ("accelerate.commands.launch", "finetune.launcher"):
            return list(words[number + 1 :])
        if name == "accelerate" and words[number + 1 : number + 2] == ["launch"]:
            return list(words[number + 2 :])
    return None


def launcher_process() -> Any:
    """The process that started this one to train, a psutil.Process; None where it was a person, a shell or a job."""
    import psutil

    try:
        parents = psutil.Process().parents()
        for parent in parents:
            words = parent.cmdline()
            torchrun = any(Path(word).name in ("torchrun", "torch.distributed.run") for word in words[:4])
            if torchrun or _launch_arguments(words) is not None:
                return parent
    except psutil.Error:
        return None
    # Another program that uses torch's agent; it starts its processes itself.
    return parents[0] if parents and "TORCHELASTIC_RUN_ID" in os.environ else None


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m finetune.launcher ARGUMENTS`: `accelerate launch ARGUMENTS`, which hands signals on.

    One process to train replaces this one, so that there is one to signal and none to leave behind. Several are started
    by torch's agent; processes print their own errors, and a line is added only about one that a signal ended.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        stop.install(at_once=_end_children)
        return _launch(arguments)
    except Interrupted:
        print(stop.line(), file=sys.stderr)
        return stop.exit_code
    except RunError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _launch(arguments: list[str]) -> int:
    import logging

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = launch_arguments(arguments)
    _check_machines(args)
    if (problem := engine_problem(args)) is not None:
        raise RunError(problem)
    kinds = (args.multi_gpu, args.use_fsdp, args.use_deepspeed, args.use_megatron_lm, args.tpu)
    if args.cpu or not any(kinds):
        _become(args, arguments)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    args = launch_command_parser().parse_args(arguments)
    # Of torch's agent only SIGQUIT: at a signal it would give the others 30 seconds, and then report its own traceback.
    args.signals_to_handle = "SIGQUIT"
    stop.when_requested(_keep_telling_children)
    progress = shared_file()
    try:
        with stop.deferred():
            launch_command(args)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        return _failed(*error.get_first_failure(), progress)
    return stop.exit_code


def _check_machines(args: Any) -> None:
    """Raise RunError for machines that would wait for each other in vain: accelerate takes the name None for a host."""
    if (args.num_machines or 1) > 1 and args.main_process_ip is None and args.rdzv_backend == "static":
        do = "add --main_process_ip HOST, the address of machine 0, and --machine_rank R, the number of this machine"
        raise RunError(Problem("accelerate", f"{args.num_machines} machines and no address of the first", do))


def _become(args: Any, arguments: list[str]) -> NoReturn:
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    command, environment = prepare_simple_launcher_cmd_env(args)
    with held():
        os.execvpe(command[0], command, {**environment, _REPLACED: json.dumps([os.getpid(), arguments])})


def _failed(rank: int, failure: Any, progress: int | None = None) -> int:
    """The exit code of the process that failed first, `failure`; for one that a signal ended also a line."""
    code = int(failure.exitcode)
    if code >= 0:
        # 128 + number: a process that was signalled before it trained ends the others, which may wait for it.
        return EXIT_CODES.get(code - 128, code)
    if stop.requested is not None:
        print(stop.line(), file=sys.stderr)
        return stop.exit_code
    memory = -code == signal.SIGKILL and memory_kills() > _MEMORY_KILLS
    doing = shared_by(progress, failure.local_rank)
    print(f"\n{ended_line(rank, socket.gethostname(), f'signal {-code}', doing, memory)}", file=sys.stderr)
    return 128 - code


def _keep_telling_children() -> None:
    """Again and again: one that is only being started may miss it.

    SIGTERM, whatever was received: exit code 0 of the first to end lets the others save.
    """
    while True:
        for child in _children():
            with suppress(OSError):
                os.kill(child, signal.SIGTERM)
        time.sleep(_SECONDS_BETWEEN_SIGNALS)


def _end_children() -> None:
    for child in _children():
        with suppress(OSError):
            os.kill(child, signal.SIGKILL)


def _children() -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process().children()]


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """The number of this process, 0 for the main one."""
    return int(environment.get("RANK", "0"))


if __name__ == "__main__":
    sys.exit(main())
