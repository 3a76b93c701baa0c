"""Signals that stop a run: obeyed at once while it prepares, noted while it trains. Imports nothing heavy.

SIGTERM, SIGUSR1, SIGINT and SIGHUP (a closed terminal) ask for the same thing, a checkpoint and an end; the exit codes
differ. `stop` is the one object of the process: Python has one handler a signal.
"""

import atexit
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

EXIT_CODES: dict[int, int] = {signal.SIGTERM: 0, signal.SIGHUP: 0, signal.SIGUSR1: 85, signal.SIGINT: 130}
"""What `finetune train` exits with. 85: to be queued again, for schedulers that tell it from an end and a failure."""

_SECONDS_TO_PREPARE_THE_END = 10
_SECONDS_BETWEEN_LOOKS = 1
_HINT = "\nsaving at the end of this step; Ctrl-C again ends at once, without saving\n"


class Interrupted(BaseException):
    """A signal arrived while nothing needs to be saved. Not an Exception: nothing on the way may handle it."""


class Stop:
    """What the process was asked for, and whether it may end at once."""

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self.began = False
        self._deferred = False
        self._code: int | None = None
        self._first: int = signal.SIGTERM
        self._when_requested: list[Callable[[], object]] = []
        self._at_once: Callable[[], object] = lambda: None

    def install(self, at_once: Callable[[], object] = lambda: None) -> None:
        """Handle the signals from now on, also those that `held` kept. On the main thread.

        `at_once` is called before a second Ctrl-C ends the process. An ignored SIGHUP, which is what `nohup` leaves,
        stays ignored.
        """
        self._at_once = at_once
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
        # A thread of its own: handlers wait for the end of a backward pass, or of a collective that has lost its rank.
        threading.Thread(target=self._listen, args=(reads,), daemon=True).start()
        for number in EXIT_CODES:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)
        os.register_at_fork(after_in_child=_handle_nothing)
        atexit.register(_ignore)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note signals meanwhile. Raises Interrupted where one has come before."""
        self.check()
        self.began = self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def check(self) -> None:
        """Raise Interrupted where a signal has come: a destructor, or a bare `except`, may have lost it."""
        if self.requested is not None:
            raise Interrupted

    def request(self, number: int) -> None:
        """Note a signal that another process has received; the first one counts."""
        if self.requested is None:
            self.requested = signal.Signals(number)

    def when_requested(self, call: Callable[[], object]) -> None:
        """Call it, on a thread of its own, as soon as the first signal arrives; a step may still be running."""
        self._when_requested.append(call)

    @property
    def exit_code(self) -> int:
        """0 where nothing was asked for."""
        return 0 if self.requested is None else EXIT_CODES[self.requested]

    @property
    def early_exit_code(self) -> int:
        """Before the training. Of several processes none exits as if it had finished: the others may wait for it."""
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        return self.exit_code if alone or self.requested is None else 128 + self.requested

    def line(self, run: Path | str | None = None, step: int | None = None, resume: str = "auto") -> str:
        """How to continue. `step`: whose checkpoint was written, None before the first; `resume`: the recipe's."""
        if run is None or step is None:
            return "stopped before it trained; run the same command again"
        how = "run the same command again" if resume == "auto" else "run the same command with training.resume=auto"
        return f"stopped after step {step}; {how} to continue from {run}/checkpoint-{step}"

    def finish(self, code: int) -> int:
        """The process is about to exit with `code`, and does so within seconds of a further signal."""
        self._code = code
        self._deferred = False
        return code

    def watch(self, launcher: Any, seconds: float) -> None:
        """Once `launcher`, a psutil.Process, is dead: as SIGTERM, and an end after `seconds` at the latest."""
        threading.Thread(target=self._watch, args=(launcher, seconds), daemon=True).start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = self.requested is None
        self.request(number)
        if first and not self._deferred and self._code is None:
            raise Interrupted

    def _listen(self, reads: int) -> None:
        interrupts, first = 0, True
        while True:
            for number in os.read(reads, 64):
                if number not in EXIT_CODES:
                    continue
                interrupts += number == signal.SIGINT
                if interrupts == 2:
                    self._at_once()
                    os._exit(EXIT_CODES[signal.SIGINT])
                if first:
                    first = False
                    self._begin_the_end(number)

    def _begin_the_end(self, number: int) -> None:
        self._first = number
        threading.Thread(target=_survive_closed_output, daemon=True).start()
        if not self._deferred:
            threading.Thread(target=self._end_soon, daemon=True).start()
        elif number == signal.SIGINT:
            _say(_HINT)
        for call in self._when_requested:
            threading.Thread(target=call, daemon=True).start()

    def _end_soon(self) -> None:
        """`Interrupted` may be lost in a destructor, or wait for a call that does not return to Python."""
        time.sleep(_SECONDS_TO_PREPARE_THE_END)
        if self._code is not None:
            os._exit(self._code)
        if not self._deferred:
            self.request(self._first)
            if os.environ.get("RANK", "0") == "0":
                _say(f"{self.line()}\n")
            os._exit(self.early_exit_code)

    def _watch(self, launcher: Any, seconds: float) -> None:
        while _is_alive(launcher):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds)
        os._exit(128 + signal.SIGTERM)


stop = Stop()


@contextmanager
def held() -> Iterator[None]:
    """Keep the signals until `install`, also over an `exec`: none may arrive between two programs' handlers."""
    signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)
    try:
        stop.check()
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)


def _handle_nothing() -> None:
    """In a forked worker, of a data loader for example: only the process that forked it ends it.

    A signal to the whole group or job would otherwise end the workers, and so the run, before the checkpoint. Whoever
    ends a worker does so with SIGTERM and waits.
    """
    signal.set_wakeup_fd(-1)
    atexit.unregister(_ignore)
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    with suppress(OSError):
        os.setpgid(0, 0)


def _say(text: str) -> None:
    """From another thread, also where the main one holds the lock of `sys.stderr`."""
    with suppress(OSError):
        os.write(2, text.encode())


def _ignore() -> None:
    """Last of all, as the interpreter takes its handlers away before it ends."""
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)


def _is_alive(process: Any) -> bool:
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _survive_closed_output() -> None:
    """A Ctrl-C ends `| tee` as well, and a terminal may be gone: writing there must not fail before the checkpoint."""
    poll, streams = select.poll(), {1, 2}
    for stream in streams:
        poll.register(stream, 0)
    while streams:
        for stream, event in poll.poll():
            poll.unregister(stream)
            streams.discard(stream)
            if not event & select.POLLNVAL:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
