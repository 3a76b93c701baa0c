"""JSON text -> a row, strictly: what Python's reader lets pass and other readers do not is an error here.

`json.loads` keeps the last of two equal keys, reads NaN and takes half a surrogate pair; each of them would be
trained on, or lost, without a word.
"""

import json
import re
from typing import Any, NoReturn

from finetune.data.rows import RowError, shown

WHITE = " \t\r\n"
WHITE_BYTES = WHITE.encode()
WRITE_JSONL = "write one JSON object a line (JSONL), UTF-8"
SAVE_UTF8 = "save the file as UTF-8"

_ESCAPED_SURROGATE = re.compile(r"\\u[dD]")
_BAD_BYTE = re.compile("[\udc80-\udcff]")
"""What `surrogateescape` makes of bytes that are not UTF-8."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RowError(twice, "the key stands twice in one object", "keep one of them")
    return row


def _no_constant(name: str) -> NoReturn:
    raise RowError(None, f"{name} is not JSON", "write null, a number, or leave the key out", name)


# One decoder for all rows: json.loads with a hook makes a new one each time, which costs as much as a small row.
DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def parse_line(content: bytes) -> dict[str, Any] | RowError:
    """The row of one line (no white space around it)."""
    try:
        return parse_text(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return not_utf8(content[error.start])


def parse_text(text: str) -> dict[str, Any] | RowError:
    """The row of one JSON text (no white space around it)."""
    try:
        value, end = DECODER.raw_decode(text)
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except RowError as error:
        return error
    except (ValueError, RecursionError) as error:
        return invalid(error, text)
    return checked(value, has_escaped_surrogate(text))


def checked(value: Any, escaped_surrogates: bool) -> dict[str, Any] | RowError:
    """The value if it is an object without half surrogate pairs; these can only come from \\ud... escapes."""
    if not isinstance(value, dict):
        return RowError(None, "a row must be a JSON object", WRITE_JSONL, shown(value))
    if escaped_surrogates and (found := _half_surrogate(value)) is not None:
        return RowError(found[0] or None, "half of a surrogate pair", "mend the \\u escapes", shown(ascii(found[1])))
    return value


def has_escaped_surrogate(text: str, start: int = 0, end: int | None = None) -> bool:
    """Whether a \\ud... escape stands in this part of the text."""
    # Most rows have no \\u at all, and that is told in a fifth of the time.
    end = len(text) if end is None else end
    return text.find("\\u", start, end) >= 0 and _ESCAPED_SURROGATE.search(text, start, end) is not None


def invalid(error: Exception, text: str, start: int = 0) -> RowError:
    """The message for text that is not JSON; the error's position minus `start` is that in `text`."""
    if isinstance(error, RecursionError):
        return RowError(None, "objects or lists nested too deep", WRITE_JSONL, shown(text))
    reason = str(error)
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} at character {error.pos - start + 1}"
    return RowError(None, f"not valid JSON ({reason})", WRITE_JSONL, shown(text))


def not_utf8(byte: int) -> RowError:
    """The message for a byte that is no part of UTF-8."""
    return RowError(None, "not UTF-8", SAVE_UTF8, f"byte 0x{byte:02x}")


def undecoded(text: str, start: int = 0, end: int | None = None) -> RowError | None:
    """What is wrong with text that was decoded with `surrogateescape`."""
    found = _BAD_BYTE.search(text, start, len(text) if end is None else end)
    return None if found is None else not_utf8(ord(found[0]) - 0xDC00)


def _half_surrogate(row: dict[str, Any]) -> tuple[str, str] | None:
    """Place and text of the first string or key that cannot be written as UTF-8."""
    waiting: list[tuple[str, Any]] = [("", row)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, str) and not is_unicode(value):
            return path, value
        if isinstance(value, dict):
            if (broken := next((key for key in value if not is_unicode(key)), None)) is not None:
                return path, broken
            waiting += reversed([(f"{path}.{key}" if path else key, entry) for key, entry in value.items()])
        elif isinstance(value, list):
            waiting += reversed([(f"{path}[{index}]", entry) for index, entry in enumerate(value)])
    return None


def is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
