"""How the processes of a run divide its work, as the launcher says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_TRUE = ("1", "true", "yes", "on", "y", "t")


@dataclass(frozen=True)
class Parallelism:
    """`shard` processes hold base, adapter and optimizer state together (FSDP2); each holds all of it where it is 1.

    `processes // shard` such groups train side by side on different rows (HSDP), or single processes do (DDP).
    """

    processes: int = 1
    shard: int = 1

    @property
    def replicate(self) -> int:
        """Number of groups, each of which holds a whole model."""
        return self.processes // self.shard

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds only a part of the model."""
        return self.shard > 1


def read_parallelism(environment: Mapping[str, str], command: Sequence[str] | None = None) -> Parallelism:
    """From the environment that the launcher made; `command`: its arguments where it was `accelerate launch`."""
    processes = int(environment.get("WORLD_SIZE", "1"))
    asked = environment.get("ACCELERATE_USE_FSDP", "false").lower() in _TRUE
    return Parallelism(processes, processes if asked else 1)
