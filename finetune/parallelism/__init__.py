"""How the processes of a run divide its work: what the launcher asks for, and what of it is refused."""

from finetune.parallelism.checks import engine_problem, fsdp_remarks, launch_problems
from finetune.parallelism.plan import Parallelism, first_line
from finetune.parallelism.settings import (
    hide_sharding,
    launch_arguments,
    launch_settings,
    parallelism_of,
    read_parallelism,
)

__all__ = [
    "Parallelism",
    "engine_problem",
    "first_line",
    "fsdp_remarks",
    "hide_sharding",
    "launch_arguments",
    "launch_problems",
    "launch_settings",
    "parallelism_of",
    "read_parallelism",
]
