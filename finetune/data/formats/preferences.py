"""Formats of two answers to one prompt, and of one answer that was judged."""

import math
import re
from collections.abc import Sequence

from finetune.data.formats.chat import sharegpt_turn, sharegpt_turns, tools_of
from finetune.data.formats.drafts import Pair, Verdict
from finetune.data.formats.fields import Fields, checked_text
from finetune.data.formats.turns import Turn, column_turn, text_or_turns
from finetune.data.rows import RowError, shown
from finetune.data.types import Message

TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")
TRUE, FALSE = ("true", "1"), ("false", "0")


def preference(row: Fields) -> Pair:
    """`chosen` and `rejected`, both texts or both lists of messages; `prompt` likewise.

    Without `prompt` it is the messages that both lists begin with; with it the lists may repeat it.
    """
    chosen, rejected = (text_or_turns(row, field, "assistant") for field in ("chosen", "rejected"))
    places = row.name("chosen"), row.name("rejected")
    if isinstance(row.required("chosen"), str) != isinstance(row.required("rejected"), str):
        what, do = f"is not of the same kind as {places[0]}", "write both as texts or both as lists of messages"
        raise RowError(places[1], what, do, shown(row.required("rejected")))
    if row.optional("prompt") is not None:
        prompt = text_or_turns(row, "prompt", "user")
        count = _repeated(prompt, chosen, rejected, row)
        return Pair(chosen[:count] or prompt, chosen[count:], rejected[count:], places, tools_of(row))
    if isinstance(row.required("chosen"), str):
        what = "is missing: two texts do not say where their prompt ends"
        raise RowError(row.name("prompt"), what, "add prompt, or name the format hh for Human/Assistant transcripts")
    return _split(chosen, rejected, places, row)


def ultrafeedback(row: Fields) -> Pair:
    """`prompt` (text), `chosen` and `rejected` (messages that repeat it), `score_chosen` above `score_rejected`."""
    for field in ("chosen", "rejected"):
        if isinstance(row.required(field), str):
            raise RowError(row.name(field), "must be a list of messages", "name the format preference", "text")
    row.text("prompt")
    pair = preference(row)
    better, worse = (_score(row, field) for field in ("score_chosen", "score_rejected"))
    if better <= worse:
        says = "no preference: both answers have this score" if better == worse else "is above the chosen answer's"
        raise RowError(row.name("score_rejected"), says, "remove the row", f"{worse}, chosen {better}")
    return pair


def hh(row: Fields) -> Pair:
    """`chosen` and `rejected`: transcripts of Human and Assistant; what both begin with is the prompt."""
    chosen, rejected = (_transcript(row, field) for field in ("chosen", "rejected"))
    return _split(chosen, rejected, (row.name("chosen"), row.name("rejected")), row)


def orca_dpo(row: Fields) -> Pair:
    """`system` (may be missing or empty), `question`, `chosen`, `rejected`: texts."""
    system = [] if row.optional_text("system") is None else [column_turn(row, "system", "system")]
    chosen, rejected = ([column_turn(row, field, "assistant")] for field in ("chosen", "rejected"))
    prompt = [*system, column_turn(row, "question", "user")]
    return Pair(prompt, chosen, rejected, (row.name("chosen"), row.name("rejected")))


def sharegpt_dpo(row: Fields) -> Pair:
    """`conversations` as in sharegpt, up to a user's turn or a tool's; `chosen` and `rejected`: one turn each."""
    chosen, rejected = ([sharegpt_turn(row.required(field), row.name(field))] for field in ("chosen", "rejected"))
    places = row.name("chosen"), row.name("rejected")
    return Pair(sharegpt_turns(row), chosen, rejected, places, tools_of(row))


def kto(row: Fields) -> Verdict:
    """`prompt`, `completion` (texts or messages), `label`: true if the completion is desirable."""
    prompt = text_or_turns(row, "prompt", "user")
    completion = text_or_turns(row, "completion", "assistant")
    return Verdict(prompt, completion, _label(row), row.name("completion"))


def _split(chosen: list[Turn], rejected: list[Turn], places: tuple[str, str], row: Fields) -> Pair:
    """The prompt is what both answers begin with."""
    count = _shared(chosen, rejected)
    if not count:
        what = f"does not begin with the same message as {places[0]}, so there is no prompt"
        raise RowError(places[1], what, "add the prompt to both", shown(rejected[0].message["content"]))
    return Pair(chosen[:count], chosen[count:], rejected[count:], places, tools_of(row))


def _shared(chosen: Sequence[Turn], rejected: Sequence[Turn]) -> int:
    """How many messages both begin with."""
    count = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one.message != other.message:
            break
        count += 1
    return count


def _repeated(prompt: Sequence[Turn], chosen: list[Turn], rejected: list[Turn], row: Fields) -> int:
    """How many messages of the answers are the prompt once more; `RowError` if they begin with another one."""
    if all(answer[0].message["role"] == "assistant" for answer in (chosen, rejected)):
        return 0
    count = _shared(chosen, rejected)
    if _shared(prompt, chosen[:count]) == len(prompt):
        return len(prompt)
    is_text = isinstance(row.required("prompt"), str)
    said = {turn.message["content"] for turn in chosen[:count] if turn.message["role"] == "user"}
    if is_text and prompt[0].message["content"] in said:
        return count  # the lists have more before it: a system message, earlier turns
    what = f"is not what {row.name('chosen')} and {row.name('rejected')} begin with"
    raise RowError(row.name("prompt"), what, "write the same prompt three times, or remove this one")


def _transcript(row: Fields, field: str) -> list[Turn]:
    text, place = row.text(field), row.name(field)
    before, *pieces = TRANSCRIPT.split(text)
    if before or not pieces:
        do = "write \\n\\nHuman: ...\\n\\nAssistant: ..., or name the data's true format"
        raise RowError(place, "is no transcript that begins with Human", do, shown(text))
    turns = []
    for speaker, said in zip(pieces[::2], pieces[1::2], strict=True):
        content = checked_text(said.removeprefix(" "), place)
        turns.append(Turn(Message(role="user" if speaker == "Human" else "assistant", content=content), place))
    return turns


def _score(row: Fields, field: str) -> float:
    value = row.required(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(row.name(field), "must be a number", "write the answer's score", shown(value))
    return value


def _label(row: Fields) -> bool:
    value = row.required("label")
    word = str(value).lower() if isinstance(value, bool | int | str) else ""  # CSV has texts only
    if word not in TRUE + FALSE:
        raise RowError(row.name("label"), "must be true or false", "write true for a desirable answer", shown(value))
    return word in TRUE
