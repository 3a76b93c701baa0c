"""How a process of a run says why the run ends."""

import signal
import sys
import threading
from contextlib import suppress

from finetune.errors import FinetuneError, RunError, as_expected
from finetune.failures.memory import out_of_memory
from finetune.failures.ranks import LAUNCHER_SECONDS, first_reason, is_connection_error
from finetune.progress import PROGRESS
from finetune.stopping import stop
from finetune.upstream import UpstreamError, private


def end_run(error: Exception) -> int:
    """Print why the run ends, once for all of its processes, and return the exit code.

    An error that is not expected is raised again, unless it only follows from one of another process.
    """
    told = _signalled()  # the launcher, which ends the others when one has ended, may be faster than this
    expected = _expected(error)
    said, says = first_reason(error if expected is None else expected)
    if not says and (stop.requested is not None or told.wait(LAUNCHER_SECONDS)):
        return RunError.exit_code  # another process, or the launcher, says it
    if expected is None and not is_connection_error(error):
        raise error
    sys.stdout.flush()  # what is kept back for a file comes before the last line
    _end_bars()
    bar = "" if PROGRESS.step is None else "\n"  # what is printed begins at the end of a progress bar
    print(f"{bar}{said}", file=sys.stderr, flush=True)
    return RunError.exit_code if expected is None else expected.exit_code


def _end_bars() -> None:
    """Progress bars print themselves once more when they are collected, which would be behind the last line."""
    with suppress(UpstreamError):
        for bar in list(private("tqdm:tqdm._instances")):
            bar.close()


def _signalled() -> threading.Event:
    """Set when SIGTERM arrives, which does nothing else from now on."""
    told = threading.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda _number, _frame: told.set())
    return told


def _expected(error: Exception) -> FinetuneError | None:
    if (memory := out_of_memory(error)) is not None:
        return memory
    if not isinstance(error, FinetuneError | OSError):
        return None
    try:
        return as_expected(error)
    except OSError:
        return None  # about no path: not expected
