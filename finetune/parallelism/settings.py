"""What the launcher asks for, read from its environment and from its command line."""

from collections.abc import Mapping, Sequence

from finetune.parallelism.plan import Parallelism

_TRUE = ("1", "true", "yes", "on", "y", "t")


def read_parallelism(environment: Mapping[str, str], command: Sequence[str] | None = None) -> Parallelism:
    """From the environment that the launcher made; `command`: its arguments where it was `accelerate launch`."""
    processes = int(environment.get("WORLD_SIZE", "1"))
    asked = environment.get("ACCELERATE_USE_FSDP", "false").lower() in _TRUE
    return Parallelism(processes, processes if asked else 1)
