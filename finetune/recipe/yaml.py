"""YAML text -> plain values, read by the YAML 1.2 core schema, with the line of every key.

PyYAML's loader reads YAML 1.1: `2e-4` is text, `no` is false, the last of two equal keys wins. ruamel.yaml reads YAML
1.2, but `1_000` as 1000 and 2026-11-22 as a date, resolves tags and anchors unseen, and stops at the first duplicate
key. So only PyYAML's event parser is used; scalars are resolved below (https://yaml.org/spec/1.2.2/#103-core-schema). A
recipe needs no tags, anchors or aliases: all are errors, and nothing is expanded or constructed.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import yaml

Value: TypeAlias = "bool | int | float | str | list[Value] | dict[str, Value] | None"
Path: TypeAlias = tuple[str | int, ...]

MAX_BYTES = 64 * 1024
MAX_DEPTH = 16
# Longer than any number in a recipe; Python raises ValueError for more than 4,300 digits.
MAX_NUMBER_CHARS = 64

_INT = re.compile(r"[-+]?[0-9]+")
_OCT = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_CONSTANTS: dict[str, Value] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **dict.fromkeys((f"{sign}.{inf}" for sign in ("", "+") for inf in ("inf", "Inf", "INF")), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
}


@dataclass(frozen=True)
class Mistake:
    """A mistake in the notation: the key `path` (may be empty), the 1-based `line`, and the message."""

    path: Path
    line: int
    what: str
    do: str
    got: str | None = None


@dataclass
class Reading:
    """The content of a text: `values`, the 1-based line of each key path, and every mistake in the notation.

    `fatal`: the text could not be read to its end. `block`: the outermost collection is in block style.
    """

    values: Value = None
    lines: dict[Path, int] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    fatal: bool = False
    block: bool = False


def resolve(text: str) -> Value:
    """One plain (unquoted) scalar by the YAML 1.2 core schema."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if len(text) > MAX_NUMBER_CHARS:
        return text
    if _INT.fullmatch(text):
        return int(text)
    if _OCT.fullmatch(text) or _HEX.fullmatch(text):
        return int(text, 0)
    return float(text) if _FLOAT.fullmatch(text) else text


def read_yaml(text: str) -> Reading:
    """Read one document. Never raises: every mistake is in `Reading.mistakes`."""
    reading = Reading()
    try:
        _Builder(text, reading).document()
    except _TooDeepError as error:
        reading.fatal = True
        do = f"keep to the sections of a recipe, at most {MAX_DEPTH} levels"
        reading.mistakes.append(Mistake((), error.line, "nested too deeply", do))
    except yaml.MarkedYAMLError as error:
        reading.fatal = True
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        what = " ".join(f"not valid YAML: {error.problem or error.context}".split())
        do = "correct the notation of this line or the one above (indentation, quotes, brackets)"
        reading.mistakes.append(Mistake((), line, what, do))
    except yaml.reader.ReaderError as error:
        reading.fatal = True
        line = text.count("\n", 0, error.position) + 1
        do = "remove this character"
        reading.mistakes.append(Mistake((), line, "not valid YAML: a control character", do))
    return reading


class _TooDeepError(Exception):
    def __init__(self, line: int) -> None:
        self.line = line


class _Builder:
    """Builds plain values from PyYAML's events, lazily: reading stops at the first bracket nested too deeply."""

    def __init__(self, text: str, reading: Reading) -> None:
        self.events: Iterator[yaml.Event] = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        self.reading = reading

    def document(self) -> None:
        next(self.events)  # StreamStart
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            return
        first = next(self.events)
        self.reading.block = isinstance(first, yaml.CollectionStartEvent) and not first.flow_style
        self.reading.values = self.value(first, ())
        next(self.events)  # DocumentEnd
        event = next(self.events)
        if isinstance(event, yaml.DocumentStartEvent):
            do = "keep one recipe a file: remove the `---` and what follows"
            self._mistake((), event, "a second document begins here", do)

    def value(self, event: yaml.Event, path: Path) -> Value:
        if len(path) > MAX_DEPTH:
            raise _TooDeepError(_line(event))
        self._check_indirections(event, path)
        if isinstance(event, yaml.MappingStartEvent):
            return self.mapping(path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(path)
        if isinstance(event, yaml.ScalarEvent):
            # implicit[0]: written without quotes and without a tag
            return resolve(event.value) if event.implicit[0] else str(event.value)
        return None  # an alias, already reported

    def mapping(self, path: Path) -> dict[str, Value]:
        values: dict[str, Value] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            # One level deeper also for the key, so that keys that are collections cannot nest without end.
            key = self.value(event, (*path, "?"))
            below = (*path, key) if isinstance(key, str) else (*path, "?")
            line = _line(event)
            first_line = self.reading.lines.setdefault(below, line) if isinstance(key, str) else line
            value = self.value(next(self.events), below)
            if not isinstance(key, str):
                self._mistake(path, event, "a key is not text", "write keys as plain words", got=_show_key(key))
            elif key in values:
                do = f"keep one of the two; the first is on line {first_line}"
                self._mistake(below, event, "duplicate key", do)
            else:
                values[key] = value
        return values

    def sequence(self, path: Path) -> list[Value]:
        values: list[Value] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            below = (*path, len(values))
            self.reading.lines[below] = _line(event)
            values.append(self.value(event, below))
        return values

    def _check_indirections(self, event: yaml.Event, path: Path) -> None:
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            self._mistake(path, event, "YAML aliases are not allowed", "write the value out", got=f"*{anchor}")
        elif anchor is not None:
            do = "remove it and write the value out where it is used"
            self._mistake(path, event, "YAML anchors are not allowed", do, got=f"&{anchor}")
        tag = getattr(event, "tag", None)
        if tag is not None:
            tag = str(tag).replace("tag:yaml.org,2002:", "!!")
            self._mistake(path, event, "YAML tags are not allowed", "remove the tag: values are plain", got=tag)

    def _mistake(self, path: Path, event: yaml.Event, what: str, do: str, got: str | None = None) -> None:
        self.reading.mistakes.append(Mistake(path, _line(event), what, do, got))


def _line(event: yaml.Event) -> int:
    return 1 if event.start_mark is None else event.start_mark.line + 1


def _show_key(key: Value) -> str:
    return "a collection" if isinstance(key, list | dict) else str(key).lower() if key is not None else "null"
