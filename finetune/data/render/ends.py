"""The token that ends an answer, found in what a template writes behind one.

Most templates close a turn with a token of its own, and generation stops at it. Some close the conversation with one
more (Phi-3.5), which the model need not write; some end the last answer with another token than earlier ones (gpt-oss);
some close nothing, and the mark of the next speaker ends the answer (GLM-4.5).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class End(NamedTuple):
    """The token that ends an answer; `appended` is what a template that closes nothing writes before the next turn."""

    token: str
    appended: str = ""


def find_end(last: str, followed: str, prompt: str, stops: Sequence[str], control: Sequence[str]) -> End | None:
    """The end of an answer from what stands behind it where it is the `last` turn, and where it is `followed` by one.

    `prompt` is what the template writes to make the model answer: a mark that is part of it ends nothing. `stops` are
    the tokens at which generation is known to stop, `control` all special tokens. None: nothing ends it.
    """
    closing = _first(last, stops)
    if closing is not None and closing in followed:
        return End(closing)
    common = _common(last, followed)
    shared = max(((common.rfind(token), token) for token in control if token in common), default=None)
    if shared is not None:
        return End(shared[1])
    if closing is not None:
        return End(closing)
    return next_speaker(last, followed, prompt, control)


def next_speaker(last: str, followed: str, prompt: str, control: Sequence[str]) -> End | None:
    """The mark of the next turn as the end of an answer."""
    behind = followed.removeprefix(last)
    mark = _first(behind, control)
    if mark is None or mark in prompt or behind[: behind.find(mark)].strip():
        return None
    return End(mark, behind[: behind.find(mark) + len(mark)])


def _first(text: str, tokens: Iterable[str]) -> str | None:
    """The token that comes first in a text; of two at one place the longer."""
    found = [(text.find(token), -len(token), token) for token in tokens if token and token in text]
    return min(found)[2] if found else None


def _common(one: str, other: str) -> str:
    """What both begin with."""
    return one[: common_length(one, other)]


def common_length(one: str, other: str) -> int:
    """How many characters both begin with."""
    length = min(len(one), len(other))
    return next((place for place in range(length) if one[place] != other[place]), length)
