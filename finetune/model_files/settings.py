"""Read what came with a model: files that another wrote, validated before transformers or tokenizers see them.

What the checks let through and a library then fails at becomes one WeightsError (`reading`), never a traceback.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError, Problem, WeightsError
from finetune.files import read_json

FETCH_AGAIN = "fetch or copy the file again"
NESTED = 32
"""Levels of objects and lists that a file of settings may have."""


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a regular file; anything else is a WeightsError that names the file."""
    try:
        value = read_json(path)
    except (OSError, ValueError, MemoryError) as error:
        raise WeightsError(Problem(str(path), "cannot be read as JSON", FETCH_AGAIN, first_line(error))) from error
    if not isinstance(value, dict):
        raise WeightsError(Problem(str(path), "must hold a JSON object", FETCH_AGAIN, got=type(value).__name__))
    return value


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object of settings, none of them nested deeply or not a number of any use."""
    settings = read_object(path)
    if problems := list(_unreadable(path, settings)):
        raise WeightsError(problems[:10])
    return settings


@contextmanager
def reading(where: Path | str, what: str = "transformers cannot read it", do: str = FETCH_AGAIN) -> Iterator[None]:
    """Turn whatever a library raises while it reads a model's files into one WeightsError with its first line.

    Errors of this package, of the disk and of memory are raised as they are.
    """
    try:
        yield
    except BaseException as error:
        # A panic in Rust (tokenizers) is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, FinetuneError) or _of_the_machine(error):
            raise
        plain = isinstance(error, OSError | ValueError) or type(error) is Exception
        got = first_line(error) if plain else f"{type(error).__name__}: {first_line(error)}"
        raise WeightsError(Problem(str(where), what, do, got)) from error


def _of_the_machine(error: BaseException) -> bool:
    """No memory, or a file that cannot be opened: said elsewhere, by path and number."""
    no_memory = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return no_memory or (isinstance(error, OSError) and error.filename is not None)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that says something, shortened; its name where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _unreadable(file: Path, settings: Any, name: str = "", depth: int = 0) -> Iterator[Problem]:
    where = f"{file}: {name}"
    if depth > NESTED:
        yield Problem(where[:200], f"is nested deeper than {NESTED} levels", FETCH_AGAIN)
    elif isinstance(settings, dict):
        for key, value in settings.items():
            yield from _unreadable(file, value, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(settings, list):
        for value in settings:
            yield from _unreadable(file, value, name, depth + 1)
    elif isinstance(settings, float) and math.isnan(settings):
        yield Problem(where, "is not a number", FETCH_AGAIN, "NaN")
