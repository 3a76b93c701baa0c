"""Commands run on models with hostile files, each in a fork of one warm process with a limit of time and memory."""

import contextlib
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS, BYTES = 20, 2**30
_POLL = 0.02
_WAIT = 6  # times as long it may take on a machine that is busy with other things
# What a value is replaced with; a whole JSON text is given as it is.
HOSTILE: tuple[Any, ...] = (
    *(None, True, -1, 0, 7, 10**9, 10**18, 0.5, -1.5, 1e308, float("nan"), float("inf")),
    *(
        "",
        "evil",
        "\x1b]0;pwned\x07\x1b[31m",
        "../../../etc/passwd",
        "kernels-community/evil",
        "https://evil.example/x",
    ),
    *([], [1, 2], ["a", "b"], {}, {"evil": {"evil": [1]}}, {"": None}, [[[[[[]]]]]]),
)


@dataclass(frozen=True)
class Outcome:
    """How one command ended: its exit code (negative: the signal), what it printed, and what it took.

    `seconds` are those of the CPU; what waits for ever is killed, and says so by its exit code.
    """

    code: int
    text: str
    seconds: float
    nbytes: int

    @property
    def faults(self) -> list[str]:
        """What a command must not do, whatever it is given."""
        found = [sign for sign in ("Traceback", "weights_only", "\x1b", "\x07") if sign in self.text]
        if self.code not in (0, 1, 2):
            found.append(f"exit {self.code}")
        if self.code in (1, 2) and not self.text.strip():
            found.append("no message")
        if self.seconds > SECONDS:
            found.append(f"{self.seconds:.0f} s")
        if self.nbytes > BYTES:
            found.append(f"{self.nbytes >> 20} MiB")
        return found


def outcome(command: Callable[[], int], log: Path) -> Outcome:
    """Run `command` in a fork of this process; it is killed at the limit of time."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sys.stdout.flush()
    sys.stderr.flush()
    started, child = time.monotonic(), os.fork()
    if child == 0:
        _run(command, log)
    code = None
    while code is None:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
        elif time.monotonic() - started > _WAIT * SECONDS:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            code = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(_POLL)
    nbytes = max(0, usage.ru_maxrss - before) << 10
    return Outcome(code, log.read_text(errors="replace"), usage.ru_utime + usage.ru_stime, nbytes)


def _run(command: Callable[[], int], log: Path) -> None:
    """The child's part; it never returns."""
    code = 99
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
        code = command()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def paths_of(value: Any, depth: int = 3) -> Iterator[tuple[Any, ...]]:
    """Where values stand in JSON, by keys and indices; of a long list or object only the first few."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, child in items[:60]:
        yield (key,)
        if depth > 1:
            yield from ((key, *path) for path in paths_of(child, depth - 1))


def mutated(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    """A copy with the value at `path` replaced; without it where `by` is `...`."""
    result = copy.deepcopy(value)
    place = result
    for key in path[:-1]:
        place = place[key]
    if by is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = by
    return result


def mutations(file: Path, seed: object, each: int) -> Iterator[tuple[str, str]]:
    """(what was changed, the file's new text) for every value of a JSON file, `each` ones drawn by `seed`."""
    value, draw = json.loads(file.read_text()), random.Random(f"{seed} {file.name}")
    for path in paths_of(value):
        for by in draw.sample((..., *HOSTILE), each):
            yield f"{file.name} {'.'.join(map(str, path))} = {by!r}"[:200], json.dumps(mutated(value, path, by))


def spoiled(folder: Path, copy_of: Path, name: str, text: str | bytes) -> Path:
    """A copy of a model's folder, one file of it with another content."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(copy_of, folder, copy_function=os.link)
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder
