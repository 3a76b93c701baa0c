"""Several processes of one group, forked: a function on each, without the time of their imports."""

import os
import socket
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any, folder: Path) -> None:
    """Run `function(*arguments)` on `count` processes of a gloo group; AssertionError with what failed on each."""
    port = free_port()
    children = [_start(rank, count, port, function, arguments, folder) for rank in range(count)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    said = [log.read_text() for rank in range(count) if (log := folder / f"rank{rank}.log").exists()]
    assert codes == [0] * count, "\n".join([f"exit codes {codes}", *said])


def _start(
    rank: int, count: int, port: int, function: Callable[..., Any], arguments: Sequence[Any], folder: Path
) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        torch.set_num_threads(1)
        PartialState._reset_state()
        AcceleratorState._reset_state()
        assert PartialState(cpu=True).num_processes == count
        function(*arguments)
        code = 0
    except BaseException:
        (folder / f"rank{rank}.log").write_text(f"rank {rank}:\n{traceback.format_exc()}")
    finally:
        os._exit(code)
