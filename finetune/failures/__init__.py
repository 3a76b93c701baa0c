"""How a run says why it ends without being finished: a process that is lost, memory that is used up."""

from finetune.failures.end import end_run
from finetune.failures.memory import out_of_memory
from finetune.failures.ranks import finish_ranks, lost_rank, ranks_training, start_timeout, watch_ranks
from finetune.failures.store import group_arguments

__all__ = [
    "end_run",
    "finish_ranks",
    "group_arguments",
    "lost_rank",
    "out_of_memory",
    "ranks_training",
    "start_timeout",
    "watch_ranks",
]
