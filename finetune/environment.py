"""Settings of the process: waiting threads, telemetry, log lines, its output. Imports nothing heavy, and no torch."""

import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper


def wait_passively() -> None:
    """Let idle OpenMP threads sleep instead of spin, unless the user has decided otherwise.

    A training step on the CPU joins its threads some ten thousand times. With spinning, the default of the OpenMP
    runtime that torch ships, one other busy process on the machine made a step 9 times slower (`benchmarks/LOG.md`).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def no_telemetry() -> None:
    """Keep Hugging Face's packages from reporting to their server, unless the user has decided otherwise.

    Without it TRL reports architecture, GPU and number of processes of each run, and every request to the hub, also one
    that the recipe asks for, first fetches a list of programs (`/api/agent-harnesses`) to name the one that it runs in.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def hush() -> None:
    """Keep two lines from every start of a command; any other warning is still shown."""
    # bitsandbytes misses a package whose one kernel, 4-bit inference on a CPU, is never called here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # transformers 5 renames these for version 6, and TRL still uses the old names.
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)


# Controls, separators and marks of direction, but for line feed and tab, which shape texts.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
# What this program itself sends: the colours of `finetune check` to a terminal, and the bars of tqdm to stderr.
_COLOURS = re.compile(r"\x1b\[(0|1|32|35)m")
_BARS = re.compile(r"\r|\x1b\[A")


_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class _Printed(TextIOWrapper):
    """A standard stream on which names and texts of files cannot give commands to the terminal."""

    own: re.Pattern[str] | None = None
    may_be_lost = False

    def write(self, text: str) -> int:
        """Write with every control character as `\\u001b`, this program's own ones excepted."""
        with self._disk_errors():
            return super().write(_escaped(text, self.own) if _CONTROLS.search(text) else text)
        return len(text)

    def flush(self) -> None:
        """Write what has been kept back."""
        with self._disk_errors():
            super().flush()

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.may_be_lost or error.errno not in _OF_A_DISK:
                raise


def _escaped(text: str, own: re.Pattern[str] | None) -> str:
    kept = [match.span() for match in own.finditer(text)] if own else []
    parts, start = [], 0
    for first, last in [*kept, (len(text), len(text))]:
        parts += [_CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text[start:first]), text[first:last]]
        start = last
    return "".join(parts)


def print_plainly(may_be_lost: bool = False) -> None:
    """Let what is printed from now on give no commands to the terminal, whatever a file or its name holds.

    A terminal without UTF-8 still shows every row. A stream that someone has put in place of Python's is left alone.
    `may_be_lost`: what a file on a full disk does not take is left out, in place of an error.
    """
    for name, own in (("stdout", _COLOURS if sys.stdout.isatty() else None), ("stderr", _BARS)):
        stream = getattr(sys, name)
        if type(stream) is TextIOWrapper:
            stream.flush()
            printed = _Printed(stream.buffer, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering)
            printed.own, printed.may_be_lost = own, may_be_lost
            setattr(sys, name, printed)
            _REPLACED.append(stream)  # it would close the file when it is collected


_REPLACED: list[TextIOWrapper] = []
