"""The text with which a chat template frames turns, where that is no special token: `[INST]`, `### Response:`, `USER:`.

A content that holds such a mark is read as one turn more. The marks are found by rendering a conversation of known
contents: they stand between these. Where the template opens turns with special tokens (ChatML) the words beside them
cannot open one alone, and only the tokens count.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from finetune.data.row_errors import RowError
from finetune.data.types import Message

Render = Callable[[Sequence[Message]], str]

_CONTENTS, _SYSTEM = ("qhxa0", "qhxb1", "qhxc2", "qhxd3"), "qhxs4"
_CONTENT = re.compile("|".join((*_CONTENTS, _SYSTEM)))
TAG = re.compile(r"<+[^<>\s][^<>\n]{0,40}>+|\[/?[A-Z_]{2,40}\]|\{/?[A-Z_]{2,40}\}")
_LONGEST = 60  # a longer line is a sentence, not a mark


class Mark(NamedTuple):
    """A piece of the frame, and where in a content it is read as such: anywhere, or alone or first in a line."""

    text: str
    place: str

    @property
    def pattern(self) -> str:
        """What finds it in a content."""
        text = re.escape(self.text)
        if self.place == "anywhere":
            return rf"(?<!\w){text}" if self.text[0].isalnum() else text
        return rf"^[ \t]*{text}" + (r"[ \t]*$" if self.place == "whole line" else "")


def frame_marks(render: Render, control: Sequence[str], bos: str | None, eos: str) -> list[Mark]:
    """The marks of a template; `control`: the special tokens."""
    marks: dict[str, Mark] = {}
    turns = [Message(role="assistant" if place % 2 else "user", content=text) for place, text in enumerate(_CONTENTS)]
    for messages in (turns, [Message(role="system", content=_SYSTEM), *turns]):
        try:
            text = render(messages)
        except RowError:
            continue  # no such role
        # A BOS that the template writes before every turn opens it (SmolLM2's is ChatML's `<|im_start|>`).
        before_answer = text.partition(_CONTENTS[0])[2].partition(_CONTENTS[1])[0]
        ends = [eos] if bos is None or bos in before_answer else [eos, bos]
        first, *pieces = _CONTENT.split(text)
        for piece in pieces[:-1]:
            for mark in _marks(piece, control, ends):
                marks.setdefault(mark.text, mark)
        if not _opens_by_token(first, control, ends):
            for tag in TAG.findall(_without(first, control)):
                marks.setdefault(tag, Mark(tag, "anywhere"))
    return list(marks.values())


def finder(marks: Sequence[Mark]) -> re.Pattern[str] | None:
    """One pattern that finds any of the marks; None if there are none."""
    return re.compile("|".join(mark.pattern for mark in marks), re.MULTILINE) if marks else None


def _marks(piece: str, control: Sequence[str], ends: Sequence[str]) -> list[Mark]:
    """The marks in the text between two contents."""
    if _opens_by_token(piece, control, ends):
        return []
    found = []
    for number, line in enumerate(_without(piece, control).split("\n")):
        text = line.strip(" \t\0")
        tags = TAG.findall(text)
        if tags:
            found += [Mark(tag, "anywhere") for tag in tags]
        elif not text or len(text) > _LONGEST or not any(map(str.isalnum, text)):
            continue
        elif text.replace(" ", "").isalnum():
            found.append(Mark(text, "whole line"))
        else:
            found.append(Mark(text, "line start" if number else "anywhere"))
    return found


def _opens_by_token(piece: str, control: Sequence[str], ends: Sequence[str]) -> bool:
    return any(token in piece for token in control if token not in ends)


def _without(piece: str, control: Sequence[str]) -> str:
    for token in control:
        piece = piece.replace(token, "\0")
    return piece
