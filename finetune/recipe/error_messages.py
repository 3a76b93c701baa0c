"""pydantic's errors as problems of a recipe: the key as typed, what is wrong, what to write. Unknown keys, too."""

import difflib
import json
import re
from collections.abc import Iterable

from finetune.recipe.other_tools import FOREIGN, FOREIGN_IN_SOURCE
from finetune.recipe.schema import PATH_OR_ID, Setting, settings
from finetune.recipe.source import COMMAND_LINE, Source, show
from finetune.recipe.yaml import Path, Value


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


_TO_WRITE = re.compile(r"(?:remove it and )?write ([\w.]+(?: or [\w.]+)*)")


def unless_given(source: Source, do: str, path: Path) -> str:
    """The advice `do` on the key at `path`, except where it is to write a key that the recipe has already.

    That key may be named in full or be one beside. An override of the command line may replace a key of the file.
    """
    names = match[1].split(" or ") if (match := _TO_WRITE.match(do)) else []
    for name in names:
        for given in (tuple(name.split(".")) if name in settings() else (), (*path[:-1], name)):
            replaces = source.place(path)[0] > source.place(given)[0] and source.place(path)[1] == COMMAND_LINE
            if given and source.get(given) is not None and not replaces:
                return f"remove it: {name} is given"
    return do


def _elsewhere(section: str, key: str) -> tuple[str, str] | None:
    """(what, do) for a key that exists with another kind of this section, or in another section."""
    own = settings().get(f"{section}.{key}")
    if own is not None and own.kinds:
        kinds = " or ".join(own.kinds)
        return f"a setting of {section}.kind: {kinds}", f"remove it, or train on pairs of answers with kind: {kinds}"
    elsewhere = _paths_of(key)
    place = f"in {section}" if section else "at the top level"
    return (f"this key does not belong {place}", "write " + " or ".join(elsewhere)) if elsewhere else None


def closest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The closest choice to a misspelt word, if there is a close one."""
    return next(iter(difflib.get_close_matches(word, list(choices), n=1, cutoff=cutoff)), None)


def _paths_of(name: str) -> list[str]:
    return [path for path in settings() if path.rpartition(".")[2] == name]


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
# A section of several kinds whose `kind` is missing or unknown is reported as a whole.
_OF_KIND = {"union_tag_not_found": "missing", "union_tag_invalid": "literal_error"}
_OTHER_VALUES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "half": "float16",
    "full": "float32",
    "fa2": "flash_attention_2",
    **dict.fromkeys(("chat", "chatml", "openai", "chat_template", "conversational", "ultrachat"), "messages"),
    **dict.fromkeys(("conversation", "conversations", "vicuna"), "sharegpt"),
    **dict.fromkeys(("prompt-completion", "instruct", "instruction_tuning"), "prompt_completion"),
    "instruction": "alpaca",
    **dict.fromkeys(("completion", "pretrain", "pretraining", "plain", "raw", "pt"), "text"),
    **dict.fromkeys(("dpo", "pairs", "ranking", "orpo", "preferences"), "preference"),
    **dict.fromkeys(("databricks-dolly", "dolly-15k"), "dolly"),
    **dict.fromkeys(("oasst1", "oasst2", "openassistant"), "oasst"),
    **dict.fromkeys(("hh-rlhf", "hh_rlhf"), "hh"),
    **dict.fromkeys(("orca", "intel"), "orca_dpo"),
    **dict.fromkeys(("skip", "ignore"), "drop"),
    **dict.fromkeys(("raise", "fail", "strict"), "error"),
    **dict.fromkeys(("merge", "user"), "merge_into_first_user"),
    **dict.fromkeys(("answers", "response", "responses", "assistant_only"), "assistant"),
    **dict.fromkeys(("last", "last_turn", "last_message"), "last_assistant"),
    **dict.fromkeys(("everything", "input", "inputs"), "all"),
    "tb": "tensorboard",
}


def report_invalid(source: Source, kind: str, location: tuple[int | str, ...]) -> None:
    """Report one of pydantic's errors; `location` may contain names of union branches, which are not in the recipe."""
    if kind in _OF_KIND:
        kind, location = _OF_KIND[kind], (*location, "kind")
    if kind == "extra_forbidden":
        section, around = _place(source, location[:-1])
        what, do = unknown_key(section, str(location[-1]), source.get((*around, "kind")))
        path = (*around, location[-1])
        source.report(path, what, unless_given(source, do, path), got=show(source.get(path)))
        return
    key, path = _place(source, location)
    setting = settings()[key]
    if kind == "missing":
        source.report(path, f"required {'section' if setting.section else 'key'} is missing", _add(setting))
        return
    if any(at[: len(path)] == path for at in source.broken) and not setting.section:
        return  # another branch of a union has already reported it, more precisely
    value = source.get(path)
    if kind in _OUT_OF_RANGE:
        what = "out of range"
    elif kind == "too_short":
        what = "empty list"
    elif kind == "literal_error" and not isinstance(value, dict | list):
        what = "not one of the known values"
    else:
        what = "wrong type"
    written = _as_text(str(path[-1]), value) if path else None
    source.report(path, what, written or _write(setting, value, inside=_inside(setting, path)), got=show(value))


def _place(source: Source, location: tuple[int | str, ...]) -> tuple[str, Path]:
    """The key of the setting at a location of pydantic's, and the path of the value as far as it was typed.

    A key has no indices: that of `data.train[1].path` is `data.train.path`.
    """
    known = settings()
    for length in range(1, len(location)):
        setting = known.get(".".join(map(str, location[:length])))
        if setting is not None and setting.many:
            location = (*location[:length], *location[length + 1 :])  # without the name of the union's branch
            break
    key = ""
    path: Path = ()
    for part in location:
        below, around = f"{key}.{part}" if key else str(part), source.get(path)
        if isinstance(part, str) and below in known:
            key, path = below, (*path, part)
        elif (isinstance(around, list) and isinstance(part, int)) or (isinstance(around, dict) and part in around):
            path = (*path, part)
    return key, path


def _inside(setting: Setting, path: Path) -> bool:
    """True if `path` lies inside the setting's value, such as an item of a list of names."""
    return [part for part in path if isinstance(part, str)] != setting.path.split(".") or isinstance(path[-1], int)


def _as_text(name: str, value: Value) -> str | None:
    """How a field of `trainer_args` that holds a mapping is written: as the text that transformers parses."""
    if not isinstance(value, dict):
        return None
    if name == "lr_scheduler_kwargs":
        return f"write it as JSON text: '{json.dumps(value)}'"
    if name == "optim_args":
        return "write it as text: " + ", ".join(f"{option}={setting}" for option, setting in value.items())
    return None


def _add(setting: Setting) -> str:
    if setting.section:
        inner = [path for path, below in settings().items() if path.startswith(f"{setting.path}.") and _always(below)]
        direct = [path.removeprefix(f"{setting.path}.") for path in inner]
        names = [name for name in direct if "." not in name]
        return "add it with " + ", ".join([PATH_OR_ID, *names] if setting.many else names)
    return f"add it: {setting.expects}"


def _always(setting: Setting) -> bool:
    return setting.required and not setting.kinds


def _write(setting: Setting, value: Value, *, inside: bool) -> str:
    """What to write instead of `value`, with the likely mistake if there is one; `inside`: an item of a list."""
    if isinstance(value, str):
        slip = _misspelt(setting, value) if inside and not setting.many else _slip_in_text(setting, value)
    else:
        slip = None if inside else _slip(setting, value)
    field = inside and setting.path == "training.trainer_args"
    expects = setting.expects.removeprefix("a mapping of names to ") if field else setting.expects
    return f"write {expects}" + (f"; {slip}" if slip else "")


def _slip(setting: Setting, value: Value) -> str | None:
    if isinstance(value, float) and value.is_integer() and "integer" in setting.expects:
        return f"{value:.0f} without a decimal point"
    if isinstance(value, int | float) and setting.expects.startswith("text"):
        return "put quotes around it"
    return None


def _slip_in_text(setting: Setting, value: str) -> str | None:
    expects = setting.expects
    if setting.section:
        return _as_section(setting, value)
    ours = _OTHER_VALUES.get(value.lower())
    if ours in _words(expects):
        return f"here it is called {ours}"
    if expects.startswith(("an integer", "a number")):
        return "without quotes or a unit"
    if expects == "true or false":
        return "without quotes; yes, no, on and off are text"
    if expects.startswith("a list of"):
        return f"a single one is written [{value}]"
    return _misspelt(setting, value)


def _as_section(setting: Setting, value: str) -> str | None:
    if setting.many:
        return f"for example {{path: {value}, format: auto}}"
    return f"for example {setting.path}: {{kind: {value}}}" if setting.path == "method" else None


def _misspelt(setting: Setting, value: str) -> str | None:
    close = closest(value, _words(setting.expects))
    return f"did you mean {close}?" if close else None


def _words(expects: str) -> list[str]:
    return re.findall(r"[\w-]+", re.sub(r"\b(one of|a list of|or)\b", "", expects))
