"""Reading rows of a named format, and naming the places of the file where an error is found later."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.data.formats import format_parsers
from finetune.data.formats.fields import Fields
from finetune.data.formats.parsed import Parsed
from finetune.data.formats.unread_columns import UnreadColumns
from finetune.data.row_errors import RowError
from finetune.data.types import RowContent
from finetune.errors import DataError, Problem
from finetune.recipe.row_formats import ROW_FORMATS, Role, RowFormat


@dataclass(frozen=True, kw_only=True)
class Format(RowFormat):
    """A row format that can be read."""

    read: Callable[[Fields], Parsed]


FORMATS: dict[str, Format] = {
    name: Format(**vars(row_format), read=getattr(format_parsers, name)) for name, row_format in ROW_FORMATS.items()
}


_PLACE = re.compile(r"(\w+)\[(\d+)\](.*)", re.DOTALL)


class Reader:
    """Rows of one format -> examples; `columns` is {field of the format: column of the file}.

    `ignored`: columns that are not read unless `columns` names them. `roles`: {the file's word: role}.
    """

    def __init__(
        self,
        row_format: Format,
        columns: Mapping[str, str],
        ignored: Collection[str] = (),
        roles: Mapping[str, Role] | None = None,
    ) -> None:
        self.format = row_format
        self._columns = dict(columns)
        self._ignored = frozenset(ignored) - set(columns.values())
        self._roles = dict(roles or {})
        self._unread = UnreadColumns(row_format, columns, ignored)
        _check_columns(row_format, columns)

    def __call__(self, row: Mapping[str, Any]) -> RowContent:
        """The content of a row; `RowError` (and nothing else) at a place named by the file's own columns."""
        content = self.content(row)
        self._unread.check(row, content)
        return content

    def content(self, row: Mapping[str, Any]) -> RowContent:
        """The same, whatever else the row has."""
        for field, column in self._columns.items():
            if column not in row:
                do = f"columns.{field} names it: correct that, or add the column"
                raise RowError(column, "is missing", do, f"keys {sorted(row)}")
        try:
            return self.format.read(self.fields(row)).content()
        except RecursionError as error:
            raise RowError(None, "is nested too deeply", "flatten it") from error

    def locate(self, row: Mapping[str, Any], place: str | None) -> str | None:
        """The file's own name of a place in the example: `messages[1].content` is `output` in an alpaca row.

        The first part of `place` is a field of the example (`messages`, `tools`, `prompt`, `chosen`, ...). None: the
        row as a whole. The row must be one that this reader reads.
        """
        if place is None:
            return None
        fields = self.fields(row)
        parts = self.format.read(fields).parts
        if place in parts:
            return _common_head(row, (turn.place for turn in parts[place]))
        match = _PLACE.fullmatch(place)
        if match is None or match[1] not in parts:
            return fields.name(place)
        turn, rest = parts[match[1]][int(match[2])], match[3]
        own = {"": turn.place, ".content": turn.content_place, ".role": turn.role_place}
        own[".reasoning"] = turn.reasoning_place or turn.place
        return own.get(rest, turn.place + rest)

    def fields(self, row: Mapping[str, Any]) -> Fields:
        """The row, seen by the names of the format."""
        if self._ignored:
            row = {column: value for column, value in row.items() if column not in self._ignored}
        return Fields(row, self._columns, self.format.aliases, self._roles)


def reader(
    row_format: str,
    columns: Mapping[str, str] | None = None,
    ignored: Collection[str] = (),
    roles: Mapping[str, Role] | None = None,
) -> Reader:
    """The reader of a format by its name; `DataError` for unknown names."""
    if row_format not in FORMATS:
        do = f"use one of {', '.join(FORMATS)}"
        raise DataError(Problem(where="format", what="unknown format", got=repr(row_format), do=do))
    return Reader(FORMATS[row_format], columns or {}, ignored, roles)


def _check_columns(row_format: Format, columns: Mapping[str, str]) -> None:
    problems = [
        Problem(
            where=f"columns.{field}",
            what=f"the format {row_format.name} has no such field",
            got=repr(column),
            do=f"its fields are {', '.join(row_format.fields)}; write {{field: column of the file}}",
        )
        for field, column in columns.items()
        if field not in row_format.fields
    ]
    field_of: dict[str, str] = {}
    for field, column in columns.items():
        if column in field_of:
            what = f"the column is already mapped to {field_of[column]}"
            problems.append(Problem(where=f"columns.{field}", what=what, got=repr(column), do="name another column"))
        field_of[column] = field
    if problems:
        raise DataError(problems)


def _common_head(row: Mapping[str, Any], places: Iterable[str]) -> str | None:
    """`conversations` for `conversations[0]`, `conversations[1]`; None where the turns are in several columns."""
    heads = {place if place in row else re.split(r"\[|\.", place, maxsplit=1)[0] for place in places}
    return heads.pop() if len(heads) == 1 else None
