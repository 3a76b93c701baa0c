"""Compile a chat template and run it with bounds on time, output and memory.

A template is a program that came with a checkpoint. transformers' sandbox keeps it from files and from Python's
insides, but lets it run for ever and write without end. Here:

- Time: a timer of the process's CPU time (SIGPROF) interrupts whatever the template does, loops and recursion that
  write nothing included. It is set before each rendering and cleared after it, which costs one to two microseconds
  with all else here, and no usual rendering ever sees a tick. A count in every loop would cost more, and miss what
  filters do. Signals reach the main thread only, and there all rendering is done; in another thread, or where a
  profiler uses the signal, a rendering has no time limit.
- Output: the pieces are counted as they come.
- Memory: the timer looks at it too, for texts that double in each round. What one operation makes cannot be
  interrupted, so the operands of those that grow are looked at before (`operand_sizes`): here, and so before Jinja
  computes constants while it compiles.

All of it belongs to the environment of the template and to the call; nothing is changed for other users of Jinja.
"""

import os
import re
import signal
from collections.abc import Callable, Iterator
from functools import cache, lru_cache, wraps
from threading import get_ident, main_thread
from time import thread_time
from typing import Any, TypeVar

from jinja2 import Environment, Template, TemplateError, UndefinedError, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune.data.render.operand_sizes import (
    GROWING_FILTERS,
    call_size,
    filter_size,
    percent_size,
    product_size,
)
from finetune.data.render.template_settings import TimeOfDayError
from finetune.data.row_errors import FileError, RowError, shown
from finetune.errors import DataError, Problem
from finetune.upstream import private

_compile = private("transformers.utils.chat_template_utils:_compile_jinja_template")

SECONDS = 10
"""CPU time of one rendering; templates take microseconds."""
CHARACTERS = 16_000_000
"""What one rendering may write, and how long a text and large a number one product may be: about 4 million tokens."""
MEMORY = 2**28
"""Bytes by which the process may grow while it renders."""

ANOTHER_TEMPLATE = "name another one in data.chat_template"

Read = TypeVar("Read")

_TICK = 0.02
_CORRECT = f"correct its loops, or {ANOTHER_TEMPLATE}"
_CHANGE_ROW = "change the row, or "
_VARIABLE = re.compile(r"'(\w+)' is undefined")


class _Stopped(BaseException):
    """The template went over a bound. No `Exception`: Jinja itself must not catch it."""

    def __init__(self, what: str, do: str) -> None:
        super().__init__(what)
        self.what, self.do = what, do


class StoppedError(DataError):
    """A template went over a bound. It is no `RowError`: what tries a template in several ways must not go on."""

    def __init__(self, what: str, do: str) -> None:
        super().__init__(Problem("data.chat_template", what, do))

    @property
    def of_row(self) -> FileError:
        """The same as the error of the row that was rendered; no setting drops it, and nothing behind it is read."""
        [problem] = self.problems
        return FileError(problem.what, f"remove the row, or {problem.do}")


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Refuses what makes too much in one step, and thereby keeps Jinja from computing it while it compiles."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The result, if it is of a usual size."""
        size = percent_size(left, right) if operator == "%" else product_size(operator, left, right, CHARACTERS)
        _require_usual(size, operator)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, /, *args: Any, **given: Any) -> Any:
        """The same of a method that a template calls."""
        if args or given:
            _require_usual(call_size(called, args, given), getattr(called, "__name__", ""))
        return super().call(context, called, *args, **given)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The same of `format` and `format_map`, which Jinja replaces by its own."""
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None

        def bounded(*args: Any, **given: Any) -> str:
            _require_usual(call_size(value, args, given), "format")
            return formatted(*args, **given)

        return bounded


def _require_usual(size: int, by: str) -> None:
    if size > CHARACTERS:
        raise _Stopped(f"makes a text or a number of more than {CHARACTERS:,} by {by}", ANOTHER_TEMPLATE)


def _bounded_filter(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja that looks at its operands first; a list that is made one by one is made here."""
    own = 1 if hasattr(filter_, "jinja_pass_arg") else 0  # the context, which some take before the value

    @wraps(filter_)
    def bounded(*args: Any, **given: Any) -> Any:
        values = list(args)
        if name == "join" and isinstance(values[own], Iterator):
            values[own] = list(values[own])
        _require_usual(filter_size(name, values[own:], given), f"the filter {name}")
        return filter_(*values, **given)

    return bounded


@cache
def environment() -> Environment:
    """transformers' environment for chat templates, with bounds. A copy: theirs is not changed."""
    given: Environment = _compile("").environment
    bounded = _BoundedEnvironment(
        trim_blocks=given.trim_blocks,
        lstrip_blocks=given.lstrip_blocks,
        extensions=[type(extension) for extension in given.extensions.values()],
    )
    bounded.filters = {
        name: _bounded_filter(name, filter_) if name in GROWING_FILTERS else filter_
        for name, filter_ in given.filters.items()
    }
    bounded.globals = given.globals
    return bounded


class _Timer:
    """Interrupts a rendering that takes too long or too much memory; one for the process, as the signal is."""

    def __init__(self) -> None:
        self._has_signal = self._rendering = False
        self._since: float | None = None
        self._memory = 0

    def start(self) -> None:
        """A rendering begins."""
        if get_ident() == _MAIN_THREAD and (self._has_signal or self._take_signal()):
            self._since, self._rendering = None, True
            signal.setitimer(signal.ITIMER_PROF, _TICK, _TICK)

    def stop(self) -> None:
        """It has ended, in whatever way."""
        if get_ident() == _MAIN_THREAD and self._has_signal:
            self._rendering = False
            signal.setitimer(signal.ITIMER_PROF, 0)

    def _take_signal(self) -> bool:
        """Take the signal, unless a profiler has it; for good: one still on its way later would end the process."""
        if signal.getsignal(signal.SIGPROF) is signal.SIG_DFL:
            signal.signal(signal.SIGPROF, self._tick)
            signal.siginterrupt(signal.SIGPROF, False)
            self._has_signal = True
        return self._has_signal

    def _tick(self, number: int, frame: object) -> None:
        if not self._rendering:
            return
        if self._since is None:
            self._since, self._memory = thread_time(), _resident()
        elif thread_time() - self._since > SECONDS:
            raise self._over(f"did not finish within {SECONDS} s")
        elif _resident() - self._memory > MEMORY:
            raise self._over(f"took more than {MEMORY >> 20} MiB of memory")

    def _over(self, what: str) -> _Stopped:
        self.stop()
        return _Stopped(what, _CORRECT)


_MAIN_THREAD = main_thread().ident
_timer = _Timer()


def _resident() -> int:
    """Bytes of memory that the process holds; 0 where the system does not say (elsewhere than on Linux)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def syntax_tree(source: str, name: str) -> nodes.Template:
    """What a template says, to be looked at; `DataError` where it cannot be read."""
    return _read(environment().parse, source, name)


@lru_cache
def compile_template(source: str, name: str) -> Template:
    """The template, ready to be run by `write`; `DataError` where it cannot be read."""
    return _read(environment().from_string, source, name)


def _read(read: Callable[[str], Read], source: str, name: str) -> Read:
    try:
        _timer.start()
        try:
            return read(source)
        finally:
            _timer.stop()
    except _Stopped as error:
        raise StoppedError(f"{name} {error.what} while it is read", error.do) from error
    except Exception as error:  # Jinja's own, and Python's for what Jinja made of it: too deep, too many loops
        what, got = f"{name} cannot be read", _said(error)
        raise DataError(Problem("data.chat_template", what, f"fix it, or {ANOTHER_TEMPLATE}", got)) from error


def write(template: Template, variables: dict[str, Any], written: list[str], name: str) -> None:
    """Add to `written` what the template writes, each piece before the next is asked for.

    `RowError` where it refuses its input or fails, `StoppedError` where it goes over a bound; `name` is what messages
    call it.
    """
    pieces = template.root_render_func(template.new_context(variables, shared=True))
    left = CHARACTERS
    try:
        _timer.start()
        try:
            for piece in pieces:
                written.append(piece)
                left -= len(piece)
                if left < 0:
                    raise _Stopped(f"wrote more than {CHARACTERS:,} characters", _CORRECT)
        finally:
            _timer.stop()
    except _Stopped as error:  # outside: the timer may interrupt the lines above it, too
        raise StoppedError(f"{name} {error.what}", error.do) from error
    except TimeOfDayError as error:
        raise time_of_day(name, str(error)) from error
    except Exception as error:  # whatever a template's own code runs into
        what, do = _failure(error)
        got = None if isinstance(error, RecursionError | MemoryError) else _said(error)
        raise RowError("messages", f"{name} {what}", do, got) from error


def time_of_day(name: str, written: str) -> RowError:
    """The error of a template that writes the time in a format with hours."""
    do = f"give the time in data.template_args where it reads such a variable, or {ANOTHER_TEMPLATE}"
    what = f"{name} writes the time of day, so training and inference would differ"
    return RowError("messages", what, do, shown(written))


def template_problem(error: RowError) -> Problem:
    """What is wrong with a template, found by rendering a conversation that is no row of the user's."""
    return Problem("data.chat_template", error.what, error.do.removeprefix(_CHANGE_ROW), error.got)


def _failure(error: Exception) -> tuple[str, str]:
    """(what, do) of an exception that the template raised."""
    if isinstance(error, SecurityError):
        return "does what the sandbox of chat templates forbids", ANOTHER_TEMPLATE
    if isinstance(error, RecursionError):
        return "calls itself without end", f"correct its macros, or {ANOTHER_TEMPLATE}"
    if isinstance(error, MemoryError):
        return "needs more memory than there is", _CORRECT
    if isinstance(error, UndefinedError) and (missing := _VARIABLE.fullmatch(str(error))):
        do = f"give {missing[1]} in data.template_args, or {ANOTHER_TEMPLATE}"
        return "needs a variable that it is not given", do
    return "refuses the conversation", f"{_CHANGE_ROW}{ANOTHER_TEMPLATE}"


def _said(error: Exception) -> str:
    """The message of an exception in one line, with the line of the template where it is known."""
    said = " ".join(str(error).split()) or type(error).__name__
    line = getattr(error, "lineno", None)
    return f"{said} (line {line})" if isinstance(error, TemplateError) and line else said
