"""`format: auto`: which format the rows are in, by reading them with every format; an unclear case is an error.

A format fits where it reads at least half of the first valid rows, or where at least half of them have all its fields
and it needs more of them than the formats that read the rows: rows that a strict format refuses are not another
format's, and its problems are shown with their lines. Of two that fit, one gives way to the other

- if the other needs all its fields and more, and finds them (`prompt`, `completion` gives way to those with a `label`);
- if both made the same examples of the rows (the first of the table stays);
- if it takes one plain text, and the other's contents occur in that text: the text is the same row, rendered.

If more than one is left, the user must choose.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from finetune.data.formats.format_parsers import UnusableRowError
from finetune.data.formats.row_reader import FORMATS, Format, Reader
from finetune.data.row_errors import RowError
from finetune.data.types import Document, RowContent, contents_of
from finetune.recipe.row_formats import Role

SAMPLE_ROWS = 100
_NEAREST = 3


@dataclass(frozen=True)
class Recognition:
    """The name of a format, and what in the rows spoke for it."""

    format: str
    why: str


@dataclass
class _Trial:
    """The result of one format on the sample: counts only, so that large rows are not kept."""

    format: Format
    reader: Reader
    read: int = 0
    present: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, Counter[str]] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    error: RowError | None = None
    unusable: list[RowError] = field(default_factory=list)
    unlike: set[str] = field(default_factory=set)
    """Formats that made another example of a row than this one, or read one that this one did not."""
    elsewhere: set[str] = field(default_factory=set)
    """Formats with a content that does not occur in this one's text."""

    def try_row(self, row: Mapping[str, Any]) -> RowContent | None:
        """Count the row's fields and read it."""
        fields = self.reader.fields(row)
        try:
            for name in self.format.fields:
                value = fields.optional(name)
                if value is not None and value != "":
                    self.columns[name] = fields.name(name)
                    self.present[name] += 1
                    self.kinds.setdefault(name, Counter())[_kind(value)] += 1
            example = self.reader.content(row)
        except RowError as error:
            self.error = self.error or error
            self.unusable += [error] if isinstance(error, UnusableRowError) else []
            return None
        self.read += 1
        return example


def recognise(
    rows: Iterable[Mapping[str, Any] | RowError],
    columns: Mapping[str, str] | None = None,
    roles: Mapping[str, Role] | None = None,
) -> Recognition:
    """The format of the first `SAMPLE_ROWS` valid rows; `RowError` lists the candidates, or what comes nearest.

    With `columns` only formats that have all the fields named there are tried.
    """
    columns = columns or {}
    trials = [
        _Trial(row_format, Reader(row_format, columns, roles=roles))
        for row_format in FORMATS.values()
        if columns.keys() <= set(row_format.fields) and row_format.recognised
    ]
    if not trials:
        what, do = "no format has all the fields that columns names", "name fields of one format"
        raise RowError(None, what, do, str(sorted(columns)))
    count, keys = 0, Counter[str]()
    for row in islice((row for row in rows if not isinstance(row, RowError)), SAMPLE_ROWS):
        count += 1
        keys.update(row.keys())
        _try_all(trials, row)
    if not count:
        raise RowError(None, "no valid row to recognise a format by", "name the format, and fix the rows")
    for trial in trials:
        if 2 * len(trial.unusable) >= count:
            raise trial.unusable[0]
    fitting = [trial for trial in trials if 2 * trial.read >= count]
    fitting += [trial for trial in trials if trial not in fitting and _has_fields(trial, count)]
    if not any(2 * trial.read >= count for trial in fitting):
        fitting = _most_fields(fitting)
    best = [one for one in fitting if not any(_gives_way(one, other) for other in fitting)]
    if len(best) == 1:
        return Recognition(best[0].format.name, _why(best[0], count))
    raise _ambiguous(best, count) if best else _nothing(trials, keys, count)


def _try_all(trials: Iterable[_Trial], row: Mapping[str, Any]) -> None:
    examples = [(trial, trial.try_row(row)) for trial in trials]
    for trial, example in examples:
        for other, others in examples:
            name = other.format.name
            if other is not trial and others is not None:
                if example != others:
                    trial.unlike.add(name)
                if not isinstance(example, Document) or not all(text in example.text for text in contents_of(others)):
                    trial.elsewhere.add(name)


_KINDS = {
    ("kto", "label"): {"true or false", "a number"},
    ("oasst", "prompt"): {"an object"},
    ("messages", "messages"): {"a list", "an object", "text"},
    ("text", "text"): {"text"},
    **{("ultrafeedback", field): {"a number", "text"} for field in ("score_chosen", "score_rejected")},
}
"""Kinds of values of fields whose names other data sets use for something else."""


def _has_fields(trial: _Trial, count: int) -> bool:
    """Whether most rows have all of the format's fields, with values of its kinds."""

    def fits(name: str) -> bool:
        kinds = _KINDS.get((trial.format.name, name))
        return 2 * trial.present[name] >= count and (kinds is None or trial.kinds[name].keys() <= kinds)

    return all(fits(name) for name in trial.format.required)


def _most_fields(trials: list[_Trial]) -> list[_Trial]:
    """Of formats none of which reads the rows, the one with most of its fields in them: its problems are shown."""
    return sorted(trials, key=lambda trial: -sum(trial.present[name] > 0 for name in trial.format.fields))[:1]


def _gives_way(one: _Trial, other: _Trial) -> bool:
    """Whether `other` explains the rows at least as well and `one` is not needed."""
    if one is other:
        return False
    needs, others_needs = set(one.format.required), set(other.format.required)
    name = other.format.name
    if needs < others_needs:
        return True
    if not one.read or not other.read:
        return not one.read
    if name not in one.unlike and not others_needs < needs:
        names = list(FORMATS)
        return names.index(name) < names.index(one.format.name)
    return one.format.gives == "document" and name not in one.elsewhere


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), type(value).__name__)


def _why(trial: _Trial, count: int) -> str:
    """`keys instruction (text), output (text); input is text in 87 of 100 rows; 100 of 100 rows read`."""
    said = [f"{trial.columns[name]} ({_kinds(trial, name)})" for name in trial.format.required]
    parts = [f"{'keys' if len(said) > 1 else 'key'} {', '.join(said)}"]
    parts += [
        f"{trial.columns[name]} is {_kinds(trial, name)} in {trial.present[name]} of {count} rows"
        for name in trial.format.optional
        if trial.present[name]
    ]
    return "; ".join([*parts, f"{trial.read} of {count} rows read"])


def _kinds(trial: _Trial, name: str) -> str:
    return " or ".join(sorted(trial.kinds.get(name, {})))


def _ambiguous(best: Iterable[_Trial], count: int) -> RowError:
    lines = [f"`format: {trial.format.name}` ({_why(trial, count)})" for trial in best]
    return RowError(None, "the rows fit more than one format", f"write one of {' or '.join(lines)}")


def _nothing(trials: Iterable[_Trial], keys: Counter[str], count: int) -> RowError:
    near = sorted(trials, key=lambda trial: (-trial.read, -_share(trial, count)))
    said = [f"{trial.format.name} ({_lacks(trial)})" for trial in near if trial.present][:_NEAREST]
    nearest = f"nearest: {', '.join(said)}. " if said else ""
    do = f"{nearest}Write the format, and map its fields to your keys with columns: {{field: key}}"
    got = f"keys {sorted(keys)}"
    return RowError(None, "the rows fit no format", do, got)


def _share(trial: _Trial, count: int) -> float:
    return sum(trial.present[name] for name in trial.format.required) / (count * len(trial.format.required))


def _lacks(trial: _Trial) -> str:
    missing = [name for name in trial.format.required if not trial.present[name]]
    if missing:
        return f"lacks {', '.join(missing)}"
    assert trial.error is not None
    error = trial.error
    return f"{trial.read} rows read; {error.field}: {error.what}"
