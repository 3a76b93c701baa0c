"""How the processes of a run divide its work."""

from dataclasses import dataclass


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

    @property
    def strategy(self) -> str:
        """In words, for the first line of a run."""
        if self.is_sharded:
            return f"FSDP2 over {self.shard}" + (f" in {self.replicate} replicas (HSDP)" if self.replicate > 1 else "")
        return "DDP" if self.processes > 1 else "one process"


def first_line(parallelism: Parallelism, hosts: list[str], device: str) -> str:
    """The first line of a run; `hosts`: the name of each process's machine."""
    processes, machines = len(hosts), len(set(hosts))
    line = f"{processes} process{'es' * (processes > 1)} on {machines} machine{'s' * (machines > 1)}, {device}"
    return f"{line}, {parallelism.strategy}" if processes > 1 else line
