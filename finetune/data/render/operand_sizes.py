"""How large the result of one operation of a chat template would be, found before it is made.

Nothing interrupts Python while it makes one text: `x.replace('a', x)`, `'a'.center(10**9)` or `'%1000000000d' % 1`
takes all memory in one step. What makes a text that is longer than its operands together is listed here; every other
method of texts, and every other filter, gives at most what it was given.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_NUMBER = re.compile(r"\d{7,}")
_BYTES = (str, bytes)


def product_size(operator: str, left: Any, right: Any, most: int, word: int = 64) -> int:
    """The length of a text or a list that a product makes, or the integer that it or a power is; 0 for all else.

    `most + 1` for numbers of more than `word` bits, which are not computed.
    """
    if isinstance(left, int) and isinstance(right, int):
        left_bits, right_bits = left.bit_length() - 1, right.bit_length() - 1
        at_least = left_bits * right if operator == "**" else left_bits + right_bits
        if at_least > word:
            return most + 1
        return int(abs(left**right)) if operator == "**" else abs(left * right)
    if isinstance(right, str | bytes | list | tuple):
        left, right = right, left
    is_product = isinstance(left, str | bytes | list | tuple) and isinstance(right, int)
    return len(left) * right if is_product else 0


def percent_size(left: Any, right: Any) -> int:
    """Of `'%9d' % right`: the largest width or precision that the text or an argument gives."""
    if not isinstance(left, _BYTES):
        return 0
    return _widest(left, right if isinstance(right, tuple) else (right,), "*")


def call_size(called: Any, args: Sequence[Any], given: Mapping[str, Any]) -> int:
    """Of a call of a method of texts or numbers; 0 for all others."""
    estimate = _METHODS.get(getattr(called, "__name__", ""))
    text = getattr(called, "__self__", None)
    if estimate is None or not isinstance(text, str | bytes | int):
        return 0
    try:
        return estimate(text, *args, **given)
    except (TypeError, ValueError):  # arguments that the method refuses, too
        return 0


def filter_size(name: str, args: Sequence[Any], given: Mapping[str, Any]) -> int:
    """Of a filter of Jinja; 0 for those that do not grow. `args` begin with the filtered value."""
    estimate = _FILTERS.get(name)
    if estimate is None:
        return 0
    try:
        return estimate(*args, **given)
    except (TypeError, ValueError):
        return 0


def _replaced(text: Any, old: Any, new: Any, count: Any = -1) -> int:
    if not isinstance(text, _BYTES):
        text = str(text)
    if len(text) * max(len(new), 1) < 2**20:
        return 0
    places = text.count(old)
    if isinstance(count, int) and 0 <= count < places:
        places = count
    return int(len(text) + places * (len(new) - len(old)))


def _joined(separator: Any, parts: Any) -> int:
    if not isinstance(parts, list | tuple | dict | str):
        return 0
    return sum(_length(part) for part in parts) + len(separator) * len(parts)


def _length(part: Any) -> int:
    return len(part) if isinstance(part, str | bytes | list | tuple | dict) else 20


def _tabs(text: Any, tabsize: int = 8) -> int:
    return int(text.count("\t" if isinstance(text, str) else b"\t") * tabsize)


def _translated(text: Any, table: Any, *_: Any) -> int:
    longest = max((_length(value) for value in table.values()), default=1) if isinstance(table, dict) else 1
    return len(text) * longest


def _formatted(text: Any, *args: Any, **given: Any) -> int:
    return _widest(text, (*args, *given.values()), "{")


def _format_map(text: Any, mapping: Mapping[str, Any]) -> int:
    return _widest(text, tuple(mapping.values()), "{")


def _widest(text: Any, args: Sequence[Any], by_argument: str) -> int:
    plain = text.decode("latin-1") if isinstance(text, bytes) else text
    widths = [int(number[0]) for number in _NUMBER.finditer(plain)]
    if by_argument in plain:
        widths += [value for value in args if isinstance(value, int)]
    # A field that is named often is written often.
    written = max((_length(value) for value in args), default=0) * plain.count("%" if by_argument == "*" else "{")
    return max([*widths, written], default=0)


def _indented(text: Any, width: Any = 4, *_: Any, **__: Any) -> int:
    return (str(text).count("\n") + 1) * (width if isinstance(width, int) else len(width))


def _wrapped(text: Any, width: int = 79, _long_words: bool = True, wrapstring: Any = None, **_: Any) -> int:
    return 0 if wrapstring is None else len(wrapstring) * (len(str(text)) // max(width, 1) + str(text).count(" ") + 1)


_METHODS: dict[str, Callable[..., int]] = {
    "replace": _replaced,
    "join": _joined,
    "center": lambda _text, width, *_: width,
    "ljust": lambda _text, width, *_: width,
    "rjust": lambda _text, width, *_: width,
    "zfill": lambda _text, width: width,
    "to_bytes": lambda _number, length=1, *_, **__: length,
    "expandtabs": _tabs,
    "translate": _translated,
    "format": _formatted,
    "format_map": _format_map,
}
_FILTERS: dict[str, Callable[..., int]] = {
    "replace": _replaced,
    "join": lambda parts, separator="", *_, **__: _joined(separator, parts),
    "center": lambda _text, width=80: width,
    "format": lambda text, *args, **given: _widest(str(text), (*args, *given.values()), "*"),
    "indent": _indented,
    "wordwrap": _wrapped,
    "batch": lambda _value, linecount, *_: linecount,
    "slice": lambda _value, slices, *_: slices,
    "tojson": lambda _value, *_, indent=None, **__: 0 if indent is None else indent * 1000,
}
GROWING_FILTERS = frozenset(_FILTERS)
