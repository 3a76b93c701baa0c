"""Memory that is used up, on the CPU or on a GPU: one message with what is known and what would help.

Imports torch only where it is there already: there may be no memory left for it.
"""

import gc
import re
import resource
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import Problem, RunError
from finetune.failures.advice import savings, size
from finetune.progress import PROGRESS

_THREAD = "can't start new thread"
_MARKS = (
    "can't allocate memory",  # torch's allocator of the CPU
    "Cannot allocate memory",  # the system, for a file that is mapped
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "bad_alloc",
    _THREAD,
)
_ASKED = re.compile(r"(?:you tried to allocate|Tried to allocate|Unable to allocate) (\d[\d.]* ?(?:bytes|[KMGTPE]i?B))")
_RESERVE = [bytes(2**20)]  # given up for the message, which needs a few objects itself
_NO_LIMIT = 2**60
_LIMITS = {resource.RLIMIT_AS: "ulimit -v", resource.RLIMIT_DATA: "ulimit -d"}
_COUNTED = {resource.RLIMIT_AS: "VmPeak", resource.RLIMIT_DATA: "VmData"}
_CGROUP = Path("/sys/fs/cgroup")

COMMANDS: Mapping[str, str] = {
    "evaluate": "use a smaller --batch-size, or --dtype bfloat16",
    "merge": "use a machine with more memory; --no-proof leaves out the checks that run the model",
    "check": "use a machine with more memory, or fewer rows: max_rows of the data set",
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was used up, whichever package has said so; also where it is the cause of another error."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, RuntimeError | OSError) and any(mark in str(error) for mark in _MARKS):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def out_of_memory(error: Exception, command: str | None = None) -> RunError | None:
    """The error to print in its place; None where memory is not what is missing. Lets go of what `error` holds.

    `command`: a command of its own, without a recipe's run.
    """
    if not is_out_of_memory(error):
        return None
    on_gpu, asked = "CUDA" in str(error) or "CUBLAS" in str(error), _asked(error)
    _RESERVE.clear()
    used = _used(on_gpu)
    _release(error)
    where = f"out of memory while {PROGRESS}" if command is None else f"finetune {command}: out of memory"
    what = f"{asked} more could not be had on the {'GPU' if on_gpu else 'CPU'}" if asked else "no more could be had"
    if _THREAD in str(error):
        what = "a thread could not be started, for want of memory or by the limit of processes (ulimit -u)"
    try:
        do = COMMANDS.get(command, "use a machine with more memory") if command else _advice(on_gpu)
        return RunError(Problem(where, what, do, used))
    except MemoryError:
        return RunError(Problem(where, what, "use a machine with more memory", used))


def _asked(error: BaseException) -> str:
    found = _ASKED.search(str(error))
    if found is None:
        return "" if error.__cause__ is None else _asked(error.__cause__)
    number, _, unit = found[1].partition(" ")
    return size(int(number)) if unit == "bytes" else found[1]


def _release(error: BaseException | None) -> None:
    """The frames of a traceback hold the tensors of the step that failed."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__, error = None, error.__cause__ or error.__context__
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _advice(on_gpu: bool) -> str:
    """The settings to change, what is saved, and the audit's table."""
    lines = []
    if PROGRESS.recipe is not None:
        lines = [str(saving) for saving in savings(PROGRESS, on_gpu)]
    advice = (
        "settings that need less, the largest saving first:"
        if lines
        else ("no setting of the recipe would need less here: use a machine with more memory, or a smaller base")
    )
    blocks = [advice, *(f"    {line}" for line in lines), PROGRESS.saved()]
    if PROGRESS.audit_table:
        blocks += ["the model's own share:", PROGRESS.audit_table]
    return "\n".join(block for block in blocks if block)


def _used(on_gpu: bool) -> str:
    """The peak so far, and what there is; while what the run holds is still there."""
    peak = f"a peak of {size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)} in memory"
    if on_gpu and "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        return f"{_gpu_used()}, {peak} of the CPU"
    limit, name = memory_limit()
    peak = f"{peak} of {size(limit)} ({name})"
    for number, counted in _COUNTED.items():
        if name == _LIMITS[number] and (value := _status(counted)):
            peak += f", which counts addresses: {size(value)}"
    return peak


def _gpu_used() -> str:
    cuda: Any = sys.modules["torch"].cuda
    free, total = cuda.mem_get_info()
    used, peak = cuda.memory_reserved(), cuda.max_memory_allocated()
    others = total - free - used
    by_others = f", of which others use {size(others)}" if others > 2**30 else ""
    return f"a peak of {size(peak)} ({size(cuda.max_memory_reserved())} with gaps) on a GPU of {size(total)}{by_others}"


def memory_limit() -> tuple[int, str]:
    """The lowest limit of this process, and what sets it."""
    import psutil

    limits = [(psutil.virtual_memory().total, "the machine's memory")]
    for number, name in _LIMITS.items():
        soft = resource.getrlimit(number)[0]
        if 0 <= soft < _NO_LIMIT:
            limits.append((soft, name))
    limits += [(limit, "the container's limit") for limit in _cgroup_limits()]
    return min(limits)


def _cgroup_limits() -> list[int]:
    """`memory.max` of the control group and of those above it; none where there is no such file system."""
    try:
        names = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    limits = []
    for name in names:
        _, controllers, path = name.split(":", 2)
        root = _CGROUP / "memory" if controllers == "memory" else _CGROUP
        file = "memory.limit_in_bytes" if controllers == "memory" else "memory.max"
        folder = root / path.lstrip("/")
        for each in (folder, *folder.parents):
            try:
                text = (each / file).read_text(encoding="utf-8").strip()
            except OSError:
                continue
            if text.isdecimal() and int(text) < _NO_LIMIT:
                limits.append(int(text))
    return limits


def _status(name: str) -> int:
    """A figure of /proc/self/status in bytes, 0 where there is none."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return 0 if found is None else int(found[1]) * 1024
