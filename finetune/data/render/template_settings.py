"""What a chat template is given beside the messages: the recipe's variables, a day in place of the clock.

It is kept with the tokenizer that carries the template, so that everything that renders with it says the same; so are
the tokens at which generation stops.
"""

from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from typing import Any

CLOCK = "strftime_now"
_DAY, _ARGS, _STOPS = "template_day", "template_args", "stop_tokens"


def template_day(tokenizer: Any) -> str | None:
    """The day as YYYY-MM-DD that the template writes; None where it writes none."""
    if CLOCK not in str(tokenizer.chat_template):
        return None
    day: str | None = getattr(tokenizer, _DAY, None)
    return day or date.today().isoformat()


def set_template_day(tokenizer: Any, day: str | None) -> None:
    """Let the template write this day (YYYY-MM-DD), whenever it is rendered; None: the day on which it is."""
    setattr(tokenizer, _DAY, day)


class TimeOfDayError(Exception):
    """A template wrote more of the time than the day."""


class DayClock:
    """What a template is given in place of the clock: midnight of a day (YYYY-MM-DD).

    A format in which another hour looks different would train what inference never says: it is in `hours`, and where
    the clock is `strict`, `TimeOfDayError`.
    """

    def __init__(self, day: str) -> None:
        self._times = [datetime.combine(date.fromisoformat(day), at) for at in (time(), time(13, 47, 11, 123456))]
        self._written: dict[str, str] = {}
        self.hours: list[str] = []
        self.strict = True

    def __call__(self, format: str) -> str:  # noqa: A002 - the name that transformers gives it
        """The day in this format."""
        if format not in self._written:
            self._written[format], afternoon = (at.strftime(format) for at in self._times)
            if self._written[format] != afternoon:
                self.hours.append(format)
        if self.strict and format in self.hours:
            raise TimeOfDayError(format)
        return self._written[format]


def clock_of(tokenizer: Any) -> DayClock | None:
    """What the template is given in place of the clock; None where it reads none."""
    day = template_day(tokenizer)
    return None if day is None else DayClock(day)


def template_args(tokenizer: Any) -> dict[str, Any]:
    """The variables of `data.template_args`; empty unless they were set."""
    return dict(getattr(tokenizer, _ARGS, {}))


def set_template_args(tokenizer: Any, args: Mapping[str, Any]) -> None:
    """Give the template these variables, whenever it is rendered."""
    setattr(tokenizer, _ARGS, dict(args))


def stop_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The tokens at which generation stops: the EOS first, then those of the checkpoint's generation config."""
    return tuple(dict.fromkeys([tokenizer.eos_token, *getattr(tokenizer, _STOPS, ())]))


def set_stop_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Let generation stop at these tokens, too."""
    setattr(tokenizer, _STOPS, tuple(tokens))
