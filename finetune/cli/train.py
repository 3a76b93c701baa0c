"""`finetune train RECIPE [key.path=value ...]`: check the recipe, then exec `accelerate launch -m finetune.train`."""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from finetune.errors import Problem, RecipeError
from finetune.stopping import held

_MAX_CONFIG_BYTES = 1 << 20
_OF_THE_LAUNCHER = {
    "num_processes": (int, "N", "processes on all machines together"),
    "num_machines": (int, "N", "machines of the run"),
    "machine_rank": (int, "R", "number of this machine, from 0"),
    "main_process_ip": (str, "HOST", "address of machine 0"),
    "main_process_port": (int, "PORT", "a port of machine 0 that all machines reach"),
}
"""Flags of `accelerate launch` that are handed on to it: they replace those of the config."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = subparsers.add_parser("train", help="train a model from a recipe")
    parser.add_argument("recipe", type=Path, help="path of a YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the recipe's")
    parser.add_argument(
        "--config_file",
        type=_existing_file,
        metavar="FILE",
        help="accelerate config of the machine, such as accelerate_configs/ddp.yaml (default: the one written by "
        "`accelerate config`, else one process on the first GPU, or on the CPU)",
    )
    for name, (kind, metavar, what) in _OF_THE_LAUNCHER.items():
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=f"{what}, in place of the config's")
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="continue the run in output_dir although this key of the recipe differs from what it began with (also "
        "data.train for other rows, model.name_or_path for another base); may be given several times",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Does not return: the launcher replaces this process, so it gets its signals and sets its exit code."""
    from finetune.recipe import load_recipe

    load_recipe(args.recipe, args.overrides)
    flags, changes = launch_flags(args.config_file, os.environ)
    replaced = [f"--{name}={value}" for name in _OF_THE_LAUNCHER if (value := getattr(args, name)) is not None]
    if replaced and (args.config_file is None and not _has_default_config(os.environ)):
        what = "without a config of accelerate a run has one process"
        do = "add --config_file, such as accelerate_configs/fsdp2.yaml, ddp.yaml or cpu_ddp.yaml"
        raise RecipeError(Problem("command line", what, do, got=" ".join(replaced)))
    launcher = [sys.executable, "-m", "finetune.launcher", *flags, *replaced]
    command = [*launcher, "-m", "finetune.train", str(args.recipe), *args.overrides]
    command += [f"--allow-change={key}" for key in args.allow_change]
    sys.stdout.flush()
    sys.stderr.flush()
    with held():
        os.execve(sys.executable, command, {**os.environ, **changes})


def launch_flags(config_file: Path | None, environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Flags for `accelerate launch`, and environment variables to change.

    Without a config accelerate guesses, warns, and gives the CPU one thread; and with one process on a machine with
    several GPUs the trainer uses DataParallel. So every flag is set, and the process sees the first GPU only.
    """
    if config_file is not None:
        return ["--config_file", str(config_file)], {}
    if _has_default_config(environment):
        return [], {}
    threads = environment.get("OMP_NUM_THREADS") or str(_cores())
    flags = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    first_gpu = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return [*flags, "--num_cpu_threads_per_process", threads], {"CUDA_VISIBLE_DEVICES": first_gpu}


def _has_default_config(environment: Mapping[str, str]) -> bool:
    return any(path.is_file() for path in default_config_files(environment))


def default_config_files(environment: Mapping[str, str]) -> list[Path]:
    """Paths of accelerate's default config; repeated here because importing accelerate imports torch."""
    cache = environment.get("XDG_CACHE_HOME", "~/.cache")
    home = Path(environment.get("HF_HOME", f"{cache}/huggingface")).expanduser()
    return [home / "accelerate" / f"default_config.{suffix}" for suffix in ("yaml", "json")]


def _cores() -> int:
    """Physical cores that this process may use; two threads on one core slow matrix products down."""
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(psutil.cpu_count(logical=False) or 1, usable or 1)


def _existing_file(text: str) -> Path:
    """A config that accelerate can read; it prints a traceback for what is none."""
    from finetune.files import read_text
    from finetune.recipe.yaml import read_yaml

    path = Path(os.path.expanduser(text))
    do = "accelerate_configs/ holds one a kind of machine"
    try:
        reading = read_yaml(read_text(path, _MAX_CONFIG_BYTES))  # JSON is YAML, too
    except FileNotFoundError:
        raise argparse.ArgumentTypeError(f"there is no such file: {text}; {do}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise argparse.ArgumentTypeError(f"cannot be read: {text}: {reason}; {do}") from None
    if reading.fatal or not isinstance(reading.values, dict):
        raise argparse.ArgumentTypeError(f"not a config of accelerate: {text}; {do}")
    return path
