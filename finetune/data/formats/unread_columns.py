"""Columns that a format does not read although they hold a part of the prompt, reasoning, or are misspelt ones.

Other columns (ids, sources, dates) are ignored, as are columns whose text stands in the example anyway, such as a
`system` beside messages that begin with it.
"""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from finetune.data.formats.reasoning import is_label
from finetune.data.row_errors import RowError, shown
from finetune.data.types import RowContent, contents_of
from finetune.recipe.row_formats import REASONING, RowFormat

MEANINGFUL = frozenset(
    {"input", "context", "passage", "choices", "options", "system", "system_prompt", "history", "tools", "functions"}
)
"""Names under which published data sets hold a part of the prompt."""
REASONING_COLUMNS = frozenset(
    {"reasoning", "reasoning_content", "thinking", "thinking_content", "cot", "complex_cot", "chain_of_thought"}
)
"""Names under which they hold what was reasoned before an answer."""
NEAR = 0.75
"""Similarity of two names from which one is taken for a misspelling of the other."""


class UnreadColumns:
    """Checks the rows of one format; `columns` and `ignored` as in the recipe."""

    def __init__(self, row_format: RowFormat, columns: Mapping[str, str], ignored: Collection[str]) -> None:
        self._format, self._columns = row_format, columns
        self._ignored = frozenset(ignored)
        self._suspects: dict[tuple[str, ...], dict[str, str | None]] = {}  # by the names of a row's columns

    def check(self, row: Mapping[str, Any], content: RowContent) -> None:
        """`RowError` for a column that is not empty, whose meaning would be lost."""
        names = tuple(row)
        suspects = self._suspects.get(names)
        if suspects is None:
            suspects = self._suspects[names] = self._find(names)
        for column, meant in suspects.items():
            if _is_empty(value := row[column]) or _stands_in(value, content):
                continue
            is_reasoning = column.lower() in REASONING_COLUMNS
            if is_reasoning and is_label(value):
                continue
            if meant is not None:
                do = f"did you mean {meant}? rename it, map it with columns: {{{meant}: {column}}},"
            elif is_reasoning:
                do = "write it into the assistant's message under reasoning_content (formats with messages),"
            else:
                do = "join it to the prompt, use a format that has it,"
            do += f" or write ignore_columns: [{column}]"
            raise RowError(column, f"is not read by the format {self._format.name}", do, shown(value))

    def _find(self, names: tuple[str, ...]) -> dict[str, str | None]:
        """The suspicious columns, each with the field that it may be meant to be."""
        read = {self._columns.get(field, field) for field in self._format.fields}
        aliases = (self._format.aliases.get(field, ()) for field in self._format.fields)
        read |= {name for names in aliases for name in names} | self._ignored
        unmapped = [name for name in self._format.optional if name not in self._columns]
        # Names near to reasoning (reason, reasoning_type) say something about the row.
        free = [name for name in unmapped if name not in names and name != REASONING]
        suspects: dict[str, str | None] = {}
        for name in names:
            if name in read:
                continue
            near = get_close_matches(name.lower(), free, 1, NEAR)
            if name.lower() in REASONING_COLUMNS:
                suspects[name] = REASONING if REASONING in unmapped else None
            elif near or name.lower() in MEANINGFUL:
                suspects[name] = near[0] if near else None
        return suspects


def _is_empty(value: object) -> bool:
    return value is None or value in ([], {}) or (isinstance(value, str) and value.strip() in ("", "[]", "{}"))


def _stands_in(value: object, content: RowContent) -> bool:
    return isinstance(value, str) and any(value.strip() in text for text in contents_of(content))
