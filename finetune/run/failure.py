"""How a process of a run says why the run ends."""

import signal
import sys
import threading
import time

from finetune.errors import FinetuneError, RunError, as_expected
from finetune.run.ranks import LAUNCHER_SECONDS, first_reason, is_connection_error


def end_run(error: Exception) -> int:
    """Print why the run ends, once for all of its processes, and return the exit code.

    An error that is not expected is raised again, unless it only follows from one of another process.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from the launcher, which ends the others: nothing to say
    expected = _expected(error)
    said, first = first_reason(error if expected is None else expected)
    if not first:
        # Once the process with the reason has ended, the launcher ends the others.
        time.sleep(LAUNCHER_SECONDS)
    if expected is None and not is_connection_error(error):
        raise error
    print(said, file=sys.stderr, flush=True)
    return RunError.exit_code if expected is None else expected.exit_code


def _expected(error: Exception) -> FinetuneError | None:
    if isinstance(error, FinetuneError | OSError):
        return as_expected(error)
    return None
