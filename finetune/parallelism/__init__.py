"""How the processes of a run divide its work, as the launcher says."""

from finetune.parallelism.plan import Parallelism, first_line
from finetune.parallelism.settings import read_parallelism

__all__ = ["Parallelism", "first_line", "read_parallelism"]
