"""Everything for which no row could be trained with a chat template, found before any row is read."""

import re

from finetune.data.render.answers import template_problems
from finetune.data.render.chat_template import PROBE_TURNS, ChatTemplate
from finetune.data.render.sandbox import ANOTHER_TEMPLATE, template_problem, time_of_day
from finetune.data.row_errors import RowError, shown
from finetune.errors import Problem

_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-f]+>")


def problems_of_template(chat: ChatTemplate) -> list[Problem]:
    """What is wrong with a template: in its source, in what it writes of the clock, in a question and its answer."""
    if chat.clock is None:
        seen = template_problems(chat, *PROBE_TURNS)
    else:
        chat.clock.strict = False
        seen = template_problems(chat, *PROBE_TURNS)
        chat.clock.strict = True
        seen[:0] = [time_of_day(chat.name, written) for written in chat.clock.hours]
    return chat.source_problems + [template_problem(error) for error in [*_addresses(chat), *seen]]


def _addresses(chat: ChatTemplate) -> list[RowError]:
    """Where the template writes an object itself and not what it says."""
    try:
        address = _ADDRESS.search(chat.text(PROBE_TURNS))
    except RowError:
        return []
    what = f"{chat.name} writes where an object lies in memory, which is another place in each process"
    return [] if address is None else [RowError("messages", what, ANOTHER_TEMPLATE, shown(address[0]))]
