"""One row, read by the names of its format; errors name the file's own columns."""

from collections.abc import Mapping
from typing import Any

from finetune.data.formats.written_messages import written_messages
from finetune.data.row_errors import RowError, shown
from finetune.data.types import WrittenFloat
from finetune.recipe.row_formats import Role

PLACEHOLDERS = frozenset(
    {"nan", "NaN", "NAN", "None", "none", "NONE", "null", "NULL", "Null", "<NA>", "N/A", "n/a", "NaT"}
)
"""Words that exports write where there is nothing. As an answer one may be meant; it is counted then."""
_ADD = "add it, map it with `columns`, or name the data's true format"


class Fields:
    """A row, the recipe's `columns` ({field of the format: column of the file}) and `roles` ({the file's word: role}).

    Null is the same as absent.

    Arrow and CSV have a column in every row or in none, so a value that is not there arrives as null or as "".
    """

    def __init__(
        self,
        row: Mapping[str, Any],
        columns: Mapping[str, str],
        aliases: Mapping[str, tuple[str, ...]],
        roles: Mapping[str, Role],
    ) -> None:
        self.row = row
        self.roles = roles
        self._columns = columns
        self._aliases = aliases

    def name(self, field: str) -> str:
        """The file's own name of a field; `RowError` if two columns with something in them could be it."""
        if field in self._columns:
            return self._columns[field]
        if self.row.get(field) not in (None, ""):
            return field
        taken = self._columns.values()
        names = [name for name in self._aliases.get(field, ()) if name in self.row and name not in taken]
        filled = [name for name in names if self.row[name] not in (None, "")]
        if len(filled) > 1:
            do = f"say which in the recipe: `columns: {{{field}: {filled[0]}}}` or `columns: {{{field}: {filled[1]}}}`"
            raise RowError(filled[0], f"this column and {filled[1]} could both be {field}", do)
        return field if self.row.get(field) is not None and not filled else next(iter(filled or names), field)

    def optional(self, field: str) -> Any:
        """The value, or None."""
        return self.row.get(self.name(field))

    def required(self, field: str) -> Any:
        """The value; `RowError` if the column is missing or null."""
        name = self.name(field)
        if name not in self.row:
            raise RowError(name, "is missing", _ADD, f"keys {sorted(self.row)}")
        value = self.row[name]
        if value is None:
            raise RowError(name, "is null", "fill it in or remove the row", "null")
        return value

    def text(self, field: str) -> str:
        """The text of a required field, unchanged; `RowError` if it is not text or empty, or is a list of messages."""
        return plain_text(self.required(field), self.name(field))

    def text_or_messages(self, field: str) -> Any:
        """The value of a required field that holds a text or a list of messages, be that a list or its text."""
        value = written_number(self.required(field), self.name(field))
        messages = written_messages(value, self.name(field)) if isinstance(value, str) else None
        return value if messages is None else messages

    def optional_text(self, field: str) -> str | None:
        """The text of a field that may be missing, null or blank; None then.

        `RowError` for a word for nothing, which some exports write into an empty cell.
        """
        value = self.optional(field)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if isinstance(value, str) and value in PLACEHOLDERS:
            do = "leave it empty (pandas: fillna(''), or read_csv(..., keep_default_na=False) before)"
            raise RowError(self.name(field), "is a word for nothing, and would be learned as a text", do, shown(value))
        return plain_text(value, self.name(field))


def plain_text(value: object, place: str) -> str:
    """As `checked_text`; `RowError` also for a list of messages written as text."""
    text = checked_text(written_number(value, place), place)
    if written_messages(text, place) is not None:
        what = "is a list of messages written as text, where this format has a plain text"
        do = "name a format that takes messages (messages, sharegpt, prompt_completion, preference)"
        raise RowError(place, what, do, shown(text))
    return text


def written_number(value: object, place: str) -> object:
    """A number as the text that the file has for it; any other value as it is.

    `RowError` for a float of a table: its column does not say whether 7 was written as 7, 7.0 or 7.00.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if isinstance(value, WrittenFloat):
        return value.text
    if isinstance(value, float):
        what = "is a number of a float column, which does not say how the text spells it"
        raise RowError(place, what, "make it a column of texts, such as 7 or 7.50", shown(value))
    return str(value)


def checked_text(value: object, place: str) -> str:
    """`value` if it is text with something in it that UTF-8 can write; `RowError` otherwise."""
    if not isinstance(value, str):
        raise RowError(place, "must be text", "write a string", shown(value))
    if not value.strip():
        raise RowError(place, "is empty", "remove the row or fill it in", shown(value))
    check_utf8(value, place)
    return value


def check_utf8(text: str, place: str) -> None:
    """Half of a surrogate pair comes from a cut `\\u` escape; no tokenizer can read it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        got = shown(ascii(text[max(0, error.start - 20) : error.start + 20]))
        raise RowError(place, "half of a surrogate pair", "fix the \\u escapes", got) from error


def below(place: str, key: str) -> str:
    """The place of a key inside an object; odd keys are written with escapes."""
    return f"{place}.{key}" if key.isprintable() and key else f"{place}[{key!a}]"
