"""Values for the checks: valid values as typed, defaults for absent keys."""

from typing import TypeVar

from finetune.recipe.fields import settings
from finetune.recipe.source import Source
from finetune.recipe.yaml12 import Path

T = TypeVar("T")


def key_path(key: str) -> Path:
    """The path of a dotted key."""
    return tuple(key.split("."))


def read(source: Source, key: str, kind: type[T]) -> T | None:
    """The value of `key`, or its default if the recipe does not set it; None if null or already reported."""
    path = key_path(key)
    if source.is_broken(path):
        return None
    value: object = source.get(path)
    if value is None:
        value = settings()[key].default
    return value if isinstance(value, kind) else None


def real(source: Source, key: str) -> float | None:
    """Like `read`, for a setting that takes integers and floats."""
    whole = read(source, key, int)
    return read(source, key, float) if whole is None else whole
