"""Imported by every Python that has this folder on its PYTHONPATH: writes down, and refuses, what goes to the network.

`NETWORK_LOG` names the file. "guard": this process is watched. "away": a name that it looked up, or an address that a
socket connected or sent to, with the lines of code; "local": the same on this machine, which is allowed. What is not
written in Python (gloo, W&B's own process) is not seen.
"""

import os
import sys
import traceback
from typing import Any

_NAMES = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
_ADDRESSES = ("socket.connect", "socket.sendto", "socket.sendmsg")
_THIS_MACHINE = ("localhost", "::1", "0.0.0.0", "::", "", "None")


def _host(event: str, args: tuple[Any, ...]) -> str | None:
    """The name or the address; None for a socket that is a file, or that is connected already."""
    if event in _NAMES:
        return args[0].decode() if isinstance(args[0], bytes) else str(args[0])
    address = args[1]
    return str(address[0]) if isinstance(address, tuple) else None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event not in _NAMES + _ADDRESSES or (host := _host(event, args)) is None:
        return
    local = host in _THIS_MACHINE or host.startswith("127.")
    where = " < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(traceback.extract_stack()[:-1]))
    _write(f"{'local' if local else 'away'} {event} {host} {where}")
    if not local:
        raise OSError(101, f"the test allows no network: {event} {host}")


def _write(line: str) -> None:
    with open(os.environ["NETWORK_LOG"], "a", encoding="utf-8") as log:
        log.write(f"{line}\n")


if "NETWORK_LOG" in os.environ:
    _write(f"guard {os.getpid()}")
    sys.addaudithook(_hook)
