"""What a chat template is given beside the messages: the recipe's variables, a day in place of the clock.

It is kept with the tokenizer that carries the template, so that everything that renders with it says the same; so are
the tokens at which generation stops.
"""

from collections.abc import Callable, Mapping, Sequence
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


def clock_of(tokenizer: Any, at: time = time()) -> dict[str, Callable[[str], str]]:
    """What a template is given in place of the clock: the day's midnight, or another hour of it."""
    day = template_day(tokenizer)
    return {} if day is None else {CLOCK: datetime.combine(date.fromisoformat(day), at).strftime}


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
