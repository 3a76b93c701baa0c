"""A store for the processes of one attempt.

torch's agent keeps its store when it starts the processes again (`--max_restarts`), with the addresses and counters of
the ended processes: the new ones would connect to those, and wait for ever. How often it has restarted is no name for
an attempt: agents of several machines count for themselves. So the processes agree on a name.
"""

import os
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from finetune.errors import Problem, RunError

_SECONDS_BETWEEN_LOOKS = 0.02


def group_arguments(timeout: timedelta, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Arguments for the process group: `timeout`, and where torch's agent has started this process also the store."""
    arguments: dict[str, Any] = {"timeout": timeout}
    by_deepspeed = environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"  # makes the group itself
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or by_deepspeed:
        return arguments
    import torch

    c10d: Any = torch.distributed  # whose stubs leave the stores out
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    address = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = c10d.TCPStore(*address, world_size, False, timeout, wait_for_workers=False)
    name = attempt(store, rank, world_size, timeout)
    return {**arguments, "store": c10d.PrefixStore(f"finetune/{name}", store), "rank": rank, "world_size": world_size}


def attempt(store: Any, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that the first process chooses, and that those of earlier attempts do not know.

    Each other process asks with a word of its own and is answered under that word. Questions that ended processes have
    left are answered as well, and nobody reads it.
    """
    word, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank != 0:
        store.set(f"finetune/ask/{rank}", word)
        try:
            store.wait([f"finetune/answer/{word}"], timeout)
        except RuntimeError as error:
            raise RunError(_not_there("rank 0 has", timeout, world_size)) from error
        name: str = store.get(f"finetune/answer/{word}").decode()
        store.set(f"finetune/{name}/{rank}", "heard")
        return name
    others = range(1, world_size)
    while missing := [other for other in others if not store.check([f"finetune/{word}/{other}"])]:
        if time.monotonic() > deadline:
            who = f"rank {missing[0]} has" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))} have"
            raise RunError(_not_there(who, timeout, world_size))
        for other in missing:
            if store.check([f"finetune/ask/{other}"]):
                store.set(f"finetune/answer/{store.get(f'finetune/ask/{other}').decode()}", word)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return word


def _not_there(who: str, timeout: timedelta, world_size: int) -> Problem:
    what = f"{who} not started within {timeout.total_seconds():.0f} s"
    do = "start the same command on every machine, and see that each machine can reach the others"
    return Problem("processes", what, do, f"{world_size} expected")
