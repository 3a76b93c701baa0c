"""Lists of messages that a file holds as text: CSV has nothing else, and pandas writes Python's spelling.

Such a column must not be learned letter by letter. A text that is a list of anything else stays a text.
"""

import ast
import json
import re
from typing import Any

from finetune.data.row_errors import RowError, shown

_KEYS = "role|content|from|value|reasoning_content|reasoning|thinking"
_BEGINS = re.compile(rf"\s*\[?\s*\{{\s*['\"](?:{_KEYS})['\"]\s*:")
_NAMES_ROLE = re.compile(r"['\"](?:role|from)['\"]\s*:")


def written_messages(text: str, place: str) -> Any:
    """The list of messages, or the one message, that `text` spells in JSON or in Python; None for any other text.

    Raises RowError for a text that begins like one and can be read as neither.
    """
    if _BEGINS.match(text) is None or _NAMES_ROLE.search(text) is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _python_value(text, place)
    entries = value if isinstance(value, list) else [value]
    return value if entries and all(_is_message(entry) for entry in entries) else None


def _python_value(text: str, place: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        what = "begins like a list of messages written as text, and is neither JSON nor Python"
        do = "write the list itself (in CSV: its JSON text, json.dumps(messages))"
        raise RowError(place, what, do, shown(text)) from error


def _is_message(entry: object) -> bool:
    return isinstance(entry, dict) and (("role" in entry) or ("from" in entry and "value" in entry))
