"""The day that a chat template writes (`strftime_now`: Llama 3.1 and later, gpt-oss): today, or that of the run.

It is kept with the tokenizer that carries the template, so that everything that renders with it says the same day.
"""

from collections.abc import Callable
from datetime import date, datetime, time
from typing import Any

CLOCK = "strftime_now"
_DAY = "template_day"


def template_day(tokenizer: Any) -> str | None:
    """The day as YYYY-MM-DD; None where the template writes none."""
    if CLOCK not in str(tokenizer.chat_template):
        return None
    day: str | None = getattr(tokenizer, _DAY, None)
    return day or date.today().isoformat()


def set_template_day(tokenizer: Any, day: str | None) -> None:
    """Let the template write this day (YYYY-MM-DD), whenever it is rendered; None: the day on which it is."""
    setattr(tokenizer, _DAY, day)


def clock_of(tokenizer: Any) -> dict[str, Callable[[str], str]]:
    """What a template is given in place of the clock: the day's midnight."""
    day = template_day(tokenizer)
    return {} if day is None else {CLOCK: datetime.combine(date.fromisoformat(day), time()).strftime}
