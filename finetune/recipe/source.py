"""The raw values of a recipe: the file's, overridden by the command line's, and the place of each."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path as FilePath

from finetune.errors import Problem, RecipeError
from finetune.files import open_regular
from finetune.recipe.yaml import MAX_BYTES, Path, Reading, Value, read_yaml

COMMAND_LINE = "command line"
MAX_SHOWN_CHARS = 80

_NAME = r"[A-Za-z_]\w*(?:\[[0-9]{1,6}\])*"
_OVERRIDE = re.compile(rf"({_NAME}(?:\.{_NAME})*)=(.*)", re.DOTALL)
_PART = re.compile(r"([A-Za-z_]\w*)|([0-9]+)")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_LARGEST = 1 << 53  # beyond it a float is another number, and other libraries take none
_SHAPE = "write key.path=value, for example lora.r=32"


class Source:
    """`values` as typed, `problems` so far, and `broken` key paths, for which no further problem is reported."""

    def __init__(self, name: str, reading: Reading) -> None:
        self.name = name
        self.values: dict[str, Value] = {}
        self.problems: list[tuple[int, Problem]] = []
        self.broken: set[Path] = set()
        self._lines = dict(reading.lines)
        self._overridden: set[Path] = set()
        for mistake in reading.mistakes:
            self.broken.add(mistake.path)
            where = ": ".join(filter(None, (f"{name}:{mistake.line}", spell(mistake.path))))
            self.problems.append((mistake.line, Problem(where, mistake.what, mistake.do, mistake.got)))
        if isinstance(reading.values, dict):
            self.values = reading.values
        elif not reading.mistakes:
            do = "write `key: value` lines, as in recipes/"
            got = "an empty file" if reading.values is None else show(reading.values)
            self.problems.append((1, Problem(f"{name}:1", "a recipe is a mapping", do, got)))
        if reading.fatal or not isinstance(reading.values, dict):
            self.raise_problems()

    def is_broken(self, path: Path) -> bool:
        """True if `path`, or a value in place of a section around it, was already reported."""
        around = (path[:length] for length in range(1, len(path)))
        return path in self.broken or any(
            at in self.broken and not isinstance(self.get(at), dict | list) for at in around
        )

    def get(self, path: Path) -> Value:
        """The value as typed; None if the key is absent."""
        value: Value = self.values
        for part in path:
            if isinstance(value, dict) and isinstance(part, str):
                value = value.get(part)
            elif isinstance(value, list) and isinstance(part, int) and part < len(value):
                value = value[part]
            else:
                return None
        return value

    def report(self, path: Path, what: str, do: str, *, got: str | None = None) -> None:
        """Add a problem at `path`; a second one at the same place, or below a broken value, is not added."""
        if self.is_broken(path):
            return
        self.broken.add(path)
        line, place = self.place(path)
        self.problems.append((line, Problem(f"{place}: {spell(path)}", what, do, got)))

    def override(self, text: str) -> None:
        """Apply one `key.path=value`."""
        match = _OVERRIDE.fullmatch(text)
        if match is None:
            do = f"remove the dashes: {_SHAPE}" if text.startswith("-") else _SHAPE
            self._override_problem("", "not an override", do, text)
            return
        key, written = match.groups()
        path = tuple(int(index) if index else name for name, index in _PART.findall(key))
        reading = read_yaml(written)
        if path in self._overridden:
            self._override_problem(key, "given twice", "keep one of the two", text)
        elif not written.strip():
            self._override_problem(key, "no value after `=`", "write a value, or null for none", text)
        elif reading.mistakes:
            self._override_problem(key, reading.mistakes[0].what, f"{reading.mistakes[0].do}, or quote the value", text)
        elif reading.block or "\n" in written:
            do = "quote text that holds `: `; write lists as [a, b] and mappings as {a: b}"
            self._override_problem(key, "not a single value", do, text)
        else:
            self._apply(path, reading)

    def _apply(self, path: Path, reading: Reading) -> None:
        around: Value = self.values
        for depth, part in enumerate(path):
            if isinstance(part, str) and around is None:
                around = self._make_section(path[:depth])
            problem = _cannot_enter(path[:depth], around, part)
            if problem is not None:
                self._override_problem(spell(path), *problem, around)
                return
            if depth < len(path) - 1:
                around = self.get(path[: depth + 1])
        _put(around, path[-1], reading.values)
        self._overridden.add(path)
        self._overridden.update((*path, *below) for below in reading.lines)
        # The file's values here are replaced; mistakes in them were already reported with the file's line.
        self._lines = {at: line for at, line in self._lines.items() if at[: len(path)] != path}

    def _make_section(self, path: Path) -> Value:
        section: dict[str, Value] = {}
        _put(self.get(path[:-1]), path[-1], section)
        self._overridden.add(path)
        return section

    def _override_problem(self, key: str, what: str, do: str, got: Value) -> None:
        where = f"{COMMAND_LINE}: {key}" if key else COMMAND_LINE
        self.problems.append((_LAST, Problem(where, what, do, got=show(got))))

    def place(self, path: Path) -> tuple[int, str]:
        """Line (for sorting) and place of `path`, or of the nearest section around it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self._overridden:
                return _LAST, COMMAND_LINE
            if path[:length] in self._lines:
                line = self._lines[path[:length]]
                return line, f"{self.name}:{line}"
        return 1, f"{self.name}:1"

    def check_values(self) -> None:
        """Report text and numbers that no setting can be, whatever its type."""
        waiting: list[tuple[Path, Value]] = [((), self.values)]
        while waiting:
            path, value = waiting.pop()
            if isinstance(value, str) and _NO_TEXT.search(value):
                self.report(path, "text with a NUL byte or half of a surrogate pair", "remove it", got=show(value))
            elif isinstance(value, int) and abs(value) > _LARGEST:
                self.report(path, "out of range", "write a smaller number", got=show(value))
            elif isinstance(value, dict):
                waiting += [((*path, key), entry) for key, entry in value.items()]
            elif isinstance(value, list):
                waiting += [((*path, index), entry) for index, entry in enumerate(value)]

    def raise_problems(self) -> None:
        """Raise all problems at once, ordered by line, those of the command line last."""
        if self.problems:
            raise RecipeError([problem for _, problem in sorted(self.problems, key=lambda entry: entry[0])])


_LAST = 10**9


def _put(around: Value, part: str | int, value: Value) -> None:
    if isinstance(around, dict):
        around[str(part)] = value
    elif isinstance(around, list):
        around[int(part)] = value


def _cannot_enter(path: Path, around: Value, part: str | int) -> tuple[str, str] | None:
    """Why the value `around` at `path` cannot hold `part`, and what to do; None if it can."""
    name = spell(path)
    if isinstance(part, str):
        if isinstance(around, dict):
            return None
        if isinstance(around, list) and around:
            return f"{name} is a list, not a section", f"name one of its items, such as {name}[0].{part}"
        return f"{name} is a value, not a section", "name a key that exists"
    whole = f"write the whole list, {name}=[...]"
    if not isinstance(around, list):
        kind = "a section" if isinstance(around, dict) else "nothing" if around is None else "a value"
        return f"{name} is {kind}, not a list", f"leave [{part}] out, or {whole}"
    if part >= len(around):
        return f"{name} has {len(around)} items, counted from 0", f"write a smaller index, or {whole}"
    return None


def read_source(path: FilePath, overrides: Sequence[str]) -> Source:
    """Read the file and apply the overrides; raises RecipeError if the file cannot be read at all."""
    source = Source(str(path), _read_file(path))
    for text in overrides:
        source.override(text)
    return source


def _read_file(path: FilePath) -> Reading:
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
        raise RecipeError(Problem(str(path), what, "give the path of a recipe, for example one of recipes/")) from None
    if len(content) > MAX_BYTES:
        do = "give a recipe; they are a few kilobytes"
        raise RecipeError(Problem(str(path), f"larger than {MAX_BYTES} bytes", do))
    try:
        return read_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(Problem(f"{path}:{line}", "not UTF-8 text", "save the file as UTF-8")) from None


def spell(path: Iterable[str | int]) -> str:
    """A key path as people write it: `data.train.path`, `lora.targets[1]`; always one line."""
    spelled = ""
    for part in path:
        if isinstance(part, int):
            spelled += f"[{part}]"
        else:
            spelled += ("." if spelled else "") + (part if part.isprintable() else json.dumps(part))
    return spelled


def show(value: object) -> str:
    """A value in YAML's spelling, on one line, cut where it is long."""
    if isinstance(value, float) and not math.isfinite(value):
        text = ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 3] + "..."
