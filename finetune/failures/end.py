"""How a process of a run says why the run ends."""

import signal
import sys
import threading
import time

from finetune.errors import FinetuneError, RunError, as_expected
from finetune.failures.memory import out_of_memory
from finetune.failures.ranks import LAUNCHER_SECONDS, first_reason, is_connection_error
from finetune.progress import PROGRESS


def end_run(error: Exception) -> int:
    """Print why the run ends, once for all of its processes, and return the exit code.

    An error that is not expected is raised again, unless it only follows from one of another process.
    """
    _on_sigterm(signal.SIG_IGN)  # the launcher, which ends the others when one has ended, may be faster than this
    expected = _expected(error)
    said, first = first_reason(error if expected is None else expected)
    if not first:
        _on_sigterm(signal.SIG_DFL)
        time.sleep(LAUNCHER_SECONDS)
    if expected is None and not is_connection_error(error):
        raise error
    bar = "" if PROGRESS.step is None else "\n"  # what is printed begins at the end of a progress bar
    print(f"{bar}{said}", file=sys.stderr, flush=True)
    return RunError.exit_code if expected is None else expected.exit_code


def _on_sigterm(handler: signal.Handlers) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _expected(error: Exception) -> FinetuneError | None:
    if (memory := out_of_memory(error)) is not None:
        return memory
    if not isinstance(error, FinetuneError | OSError):
        return None
    try:
        return as_expected(error)
    except OSError:
        return None  # about no path: not expected
