"""A limit of CPU time for matching expressions that others wrote; Python's `re` looks for signals while it matches."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread


class OverLimitError(BaseException):
    """The time is over. No `Exception`: what is interrupted must not catch it."""


_running = False


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise OverLimitError in the code within once it has taken `seconds` of CPU time.

    Signals reach the main thread only: in another one there is no limit. Limits within each other count as the outer.
    """
    global _running
    if _running or current_thread() is not main_thread():
        yield
        return
    # For good: a signal that is still on its way when the timer has been stopped would end the process.
    signal.signal(signal.SIGVTALRM, _over)
    _running = True
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        _running = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _over(_number: int, _frame: object) -> None:
    if _running:
        raise OverLimitError
