"""What to say about a key that is no setting: another tool's, in the wrong section, or misspelt."""

import difflib
from collections.abc import Iterable

from finetune.recipe.fields import settings
from finetune.recipe.foreign import FOREIGN, FOREIGN_IN_SOURCE


def unknown_key(section: str, key: str) -> tuple[str, str]:
    """(what is wrong, what to do) for `key` in `section` (a key path, empty for the top level)."""
    known = settings()
    if section in known and known[section].many and key in FOREIGN_IN_SOURCE:
        return f"unknown key: {FOREIGN_IN_SOURCE[key].what}", FOREIGN_IN_SOURCE[key].do
    elsewhere = _paths_of(key)
    if elsewhere:
        place = f"in {section}" if section else "at the top level"
        return f"this key does not stand {place}", "write " + " or ".join(elsewhere)
    if key in FOREIGN:
        return f"unknown key: {FOREIGN[key].what}", FOREIGN[key].do
    prefix = f"{section}." if section else ""
    names = [path.removeprefix(prefix) for path in known if path.startswith(prefix)]
    siblings = [name for name in names if "." not in name]
    if here := closest(key, siblings):
        return "unknown key", f"did you mean {prefix}{here}?"
    if anywhere := closest(key, [path.rpartition(".")[2] for path in settings()], cutoff=0.8):
        return "unknown key", f"did you mean {' or '.join(_paths_of(anywhere))}?"
    return "unknown key", "write one of " + ", ".join(siblings)


def closest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The choice most like a misspelt word, if one is like it at all."""
    return next(iter(difflib.get_close_matches(word, list(choices), n=1, cutoff=cutoff)), None)


def _paths_of(name: str) -> list[str]:
    return [path for path in settings() if path.rpartition(".")[2] == name]
