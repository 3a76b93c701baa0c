"""Everything for which no row could be trained with a chat template, found before any row is read."""

import re
from collections.abc import Callable
from datetime import time

from finetune.data.render.answers import template_problems
from finetune.data.render.chat_template import PROBE_TURNS, ChatTemplate
from finetune.data.render.ends import common_length
from finetune.data.render.sandbox import ANOTHER_TEMPLATE, template_problem
from finetune.data.row_errors import RowError, shown
from finetune.errors import Problem

_HOURS = time(), time(13, 47, 11, 123456)
"""Two hours of a day in which every digit of a clock differs that can."""

_WORD = re.compile(r"[\w:]+")
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-f]+>")


def problems_of_template(chat: ChatTemplate) -> list[Problem]:
    """What is wrong with a template: in its source, between two renderings, in a question and its answer."""
    seen = _changes(chat.name, lambda hour: chat.at(hour, PROBE_TURNS)) + template_problems(chat, *PROBE_TURNS)
    return chat.source_problems + [template_problem(error) for error in seen]


def _changes(name: str, render_at: Callable[[time], str]) -> list[RowError]:
    """What a template writes that inference would not write again: the hour, the address of an object in memory.

    `render_at` renders a conversation with the template's clock at an hour. Nothing where the template refuses it.
    """
    try:
        midnight, again, later = map(render_at, (_HOURS[0], *_HOURS))
    except RowError:
        return []
    if address := _ADDRESS.search(midnight):
        what = f"{name} writes where an object lies in memory, which is another place in each process"
        return [RowError("messages", what, ANOTHER_TEMPLATE, shown(address[0]))]
    if midnight == later or midnight != again:  # what is drawn at random is found in the source
        return []
    what = f"{name} writes the time of day, so training and inference would differ"
    do = f"give the time in data.template_args where it reads such a variable, or {ANOTHER_TEMPLATE}"
    return [RowError("messages", what, do, shown(_difference(midnight, later)))]


def _difference(one: str, other: str) -> str:
    """What `other` has in place of what `one` says, with the letters, digits and colons beside it."""
    begin = common_length(one, other)
    end = len(other) - common_length(one[begin:][::-1], other[begin:][::-1])
    words = [word for word in _WORD.finditer(other) if word.end() > begin and word.start() < end]
    if words:
        begin, end = min(begin, words[0].start()), max(end, words[-1].end())
    return other[begin:end].strip()
