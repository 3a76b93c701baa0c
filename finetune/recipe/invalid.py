"""pydantic's errors in the words of a recipe: the key as typed, what is wrong, what to write."""

import re

from finetune.recipe.fields import Setting, settings
from finetune.recipe.source import Source, show
from finetune.recipe.unknown import closest, unknown_key
from finetune.recipe.yaml12 import Path, Value

_OUT_OF_RANGE = frozenset(
    (
        "greater_than",
        "greater_than_equal",
        "less_than",
        "less_than_equal",
        "finite_number",
        "string_too_short",
    )
)
_VALUES_OF_HABIT = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "half": "float16",
    "full": "float32",
    "fa2": "flash_attention_2",
    "chat": "messages",
    "sharegpt": "messages",
    "chatml": "messages",
    "prompt-completion": "prompt_completion",
    "instruction": "alpaca",
    "tb": "tensorboard",
}


def report_invalid(source: Source, kind: str, location: tuple[int | str, ...]) -> None:
    """Word one of pydantic's errors; `location` may end in names of union branches, which nobody typed."""
    if kind == "extra_forbidden":
        what, do = unknown_key(".".join(map(str, location[:-1])), str(location[-1]))
        source.report(location, what, do, got=show(source.get(location)))
        return
    setting, path = _setting_at(source, location)
    if kind == "missing":
        source.report(path, f"required {'section' if setting.section else 'key'} is missing", _add(setting))
        return
    if any(at[: len(path)] == path for at in source.broken) and not setting.section:
        return  # another branch of a union has already said it, more exactly
    value = source.get(path)
    if kind in _OUT_OF_RANGE:
        what = "out of range"
    elif kind == "literal_error" and not isinstance(value, dict | list):
        what = "not one of the known values"
    else:
        what = "wrong type"
    source.report(path, what, _write(setting, value, inside=".".join(map(str, path)) != setting.path), got=show(value))


def _setting_at(source: Source, location: tuple[int | str, ...]) -> tuple[Setting, Path]:
    """The setting that a location of pydantic's lies in, and the path of the value as far as it was typed."""
    known = settings()
    length = len(location)
    while ".".join(map(str, location[:length])) not in known:
        length -= 1
    setting, path = known[".".join(map(str, location[:length]))], location[:length]
    for part in location[length:]:
        around = source.get(path)
        if (isinstance(around, list) and isinstance(part, int)) or (isinstance(around, dict) and part in around):
            path = (*path, part)
    return setting, path


def _add(setting: Setting) -> str:
    if setting.section:
        inner = [path for path, below in settings().items() if path.startswith(f"{setting.path}.") and below.required]
        direct = [path.removeprefix(f"{setting.path}.") for path in inner]
        return "add it with " + ", ".join(name for name in direct if "." not in name)
    return f"add it: {setting.expects}"


def _write(setting: Setting, value: Value, *, inside: bool) -> str:
    """What to write instead of `value`, with the likely slip where there is one; `inside`: an item of a list."""
    if isinstance(value, str):
        slip = _misspelt(setting, value) if inside else _slip_in_text(setting, value)
    else:
        slip = None if inside else _slip(setting, value)
    return f"write {setting.expects}" + (f"; {slip}" if slip else "")


def _slip(setting: Setting, value: Value) -> str | None:
    if isinstance(value, float) and value.is_integer() and "integer" in setting.expects:
        return f"{value:.0f} without a decimal point"
    if isinstance(value, int | float) and setting.expects.startswith("text"):
        return "put quotes around it"
    return None


def _slip_in_text(setting: Setting, value: str) -> str | None:
    expects = setting.expects
    if setting.section:
        return f"for example {setting.path}: {{kind: {value}}}" if setting.path == "method" else None
    ours = _VALUES_OF_HABIT.get(value.lower())
    if ours in _words(expects):
        return f"here it is called {ours}"
    if expects.startswith(("an integer", "a number")):
        return "without quotes or a unit"
    if expects == "true or false":
        return "without quotes; yes, no, on and off are text"
    if expects.startswith("a list of"):
        return f"a single one is written [{value}]"
    return _misspelt(setting, value)


def _misspelt(setting: Setting, value: str) -> str | None:
    close = closest(value, _words(setting.expects))
    return f"did you mean {close}?" if close else None


def _words(expects: str) -> list[str]:
    return re.findall(r"[\w-]+", re.sub(r"\b(one of|a list of|or)\b", "", expects))
