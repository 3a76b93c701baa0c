"""A bound on the time that the rendering of one row takes, where a template needs a text or more for each answer."""

from time import thread_time

from finetune.data.render.sandbox import StoppedError

SECONDS = 10
"""CPU time for all renderings of one row and for what is looked at in them."""


class RowClock:
    """Started with each row, and looked at wherever something is done for each of its turns."""

    def __init__(self) -> None:
        self._end: float | None = None
        self._turns = 0

    def start(self, turns: int) -> None:
        """A row of so many turns begins."""
        self._end, self._turns = thread_time() + SECONDS, turns

    def check(self) -> None:
        """Raise `StoppedError` where the row has taken too long."""
        if self._end is not None and thread_time() > self._end:
            what = f"rendering a conversation of {self._turns:,} messages did not finish within {SECONDS} s"
            raise StoppedError(what, "split it into shorter conversations")
