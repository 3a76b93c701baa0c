"""Special tokens of a tokenizer, and whether a text holds one: text that says it is read as that token."""

from collections.abc import Iterable, Iterator
from typing import Any


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens, the longest first."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(special, key=lambda token: (-len(token), token)))


ByFirstCharacter = list[tuple[str, list[str]]]


def by_first_character(tokens: Iterable[str]) -> ByFirstCharacter:
    """Tokens by their first character, for `find_token`."""
    groups: dict[str, list[str]] = {}
    for token in tokens:
        groups.setdefault(token[:1], []).append(token)
    return list(groups.items())


def find_token(text: str, groups: ByFirstCharacter) -> str | None:
    """The first of the tokens that occurs in a text."""
    for first, tokens in groups:
        if first in text:
            for token in tokens:
                if token in text:
                    return token
    return None


def strings(value: object) -> Iterator[str]:
    """Every string inside a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)
