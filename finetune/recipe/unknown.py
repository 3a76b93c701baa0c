"""Messages for unknown keys: of another tool, in the wrong section, or misspelt."""

import difflib
from collections.abc import Iterable

from finetune.recipe.fields import settings
from finetune.recipe.foreign import FOREIGN, FOREIGN_IN_SOURCE


def unknown_key(section: str, key: str, kind: object = None) -> tuple[str, str]:
    """(what is wrong, what to do) for `key` in `section` (a key path, empty for the top level) of this `kind`."""
    known = settings()
    if section in known and known[section].many and key in FOREIGN_IN_SOURCE:
        return f"unknown key: {FOREIGN_IN_SOURCE[key].what}", FOREIGN_IN_SOURCE[key].do
    if key in FOREIGN:
        return f"unknown key: {FOREIGN[key].what}", FOREIGN[key].do
    if placed := _elsewhere(section, key):
        return placed
    prefix = f"{section}." if section else ""
    allowed = [path for path, key in known.items() if not key.kinds or kind in key.kinds]
    names = [path.removeprefix(prefix) for path in allowed if path.startswith(prefix)]
    siblings = [name for name in names if "." not in name]
    if here := closest(key, siblings):
        return "unknown key", f"did you mean {prefix}{here}?"
    if anywhere := closest(key, [path.rpartition(".")[2] for path in settings()], cutoff=0.8):
        return "unknown key", f"did you mean {' or '.join(_paths_of(anywhere))}?"
    return "unknown key", "write one of " + ", ".join(siblings)


def _elsewhere(section: str, key: str) -> tuple[str, str] | None:
    """(what, do) for a key that exists with another kind of this section, or in another section."""
    own = settings().get(f"{section}.{key}")
    if own is not None and own.kinds:
        kinds = " or ".join(own.kinds)
        return f"a setting of {section}.kind: {kinds}", f"remove it, or write kind: {kinds}"
    elsewhere = _paths_of(key)
    place = f"in {section}" if section else "at the top level"
    return (f"this key does not belong {place}", "write " + " or ".join(elsewhere)) if elsewhere else None


def closest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The closest choice to a misspelt word, if there is a close one."""
    return next(iter(difflib.get_close_matches(word, list(choices), n=1, cutoff=cutoff)), None)


def _paths_of(name: str) -> list[str]:
    return [path for path in settings() if path.rpartition(".")[2] == name]
