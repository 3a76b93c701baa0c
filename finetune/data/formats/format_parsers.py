"""The row formats, one function each, under the name that the recipe gives the format: a row -> its parsed form."""

import math
import re
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from finetune.data.formats.fields import Fields, checked_text, plain_text
from finetune.data.formats.messages import (
    SHAREGPT,
    Spelling,
    Turn,
    column_turn,
    read_message,
    read_turns,
    text_or_turns,
)
from finetune.data.formats.parsed import (
    ParsedConversation,
    ParsedJudgement,
    ParsedPair,
    ParsedText,
    check_prompt_not_repeated,
)
from finetune.data.formats.reasoning import check_same_reasoning, column_reasoning
from finetune.data.formats.tools import parse_json, read_tools, says_nothing
from finetune.data.row_errors import RowError, shown
from finetune.data.types import Message
from finetune.recipe.row_formats import REASONING, Role


def messages(row: Fields) -> ParsedConversation:
    """`messages`: OpenAI's chat, with `tools` (a list, or its JSON text) beside it."""
    return ParsedConversation(read_turns(row, "messages"), tools_of(row))


def sharegpt(row: Fields) -> ParsedConversation:
    """`conversations` or `conversation`: turns of from and value, or of role and content; `system`, `tools`."""
    return ParsedConversation(sharegpt_turns(row), tools_of(row))


def sharegpt_turns(row: Fields) -> list[Turn]:
    """The row's `system`, if it has one, and its turns."""
    return _with_system(row, read_turns(row, "conversations", SHAREGPT))


def _with_system(row: Fields, turns: list[Turn]) -> list[Turn]:
    """The row's `system`, if it has one, and `turns`, which must have no other."""
    if row.optional_text("system") is None:
        return turns
    if turns[0].message["role"] == "system":
        if turns[0].message["content"]:
            do = "keep one of the two"
            raise RowError(row.name("system"), f"the row has a second system message in {turns[0].place}", do)
        turns = turns[1:]
    return [column_turn(row, "system", "system"), *turns]


def tools_of(row: Fields) -> list[dict[str, Any]] | None:
    """The tools of the row."""
    return read_tools(row.optional("tools"), row.name("tools"))


def alpaca(row: Fields) -> ParsedConversation:
    """`instruction`, and after an empty line `input`, -> user; `output` -> assistant; `history`: earlier pairs."""
    return ParsedConversation(_with_system(row, [*_history(row), *_question_and_answer(row, "input", "output")]))


def dolly(row: Fields) -> ParsedConversation:
    """`instruction`, and after an empty line `context`, -> user; `response` -> assistant."""
    return ParsedConversation(_question_and_answer(row, "context", "response"))


def prompt_completion(row: Fields) -> ParsedConversation:
    """`prompt` and `completion`, each text or a list of messages; the prompt's assistant messages are not learned.

    Before them `system`, and `history`: earlier pairs, which are learned. `reasoning` is that of the completion.
    """
    prompt = text_or_turns(row, "prompt", "user")
    completion = _with_reasoning(row, text_or_turns(row, "completion", "assistant"))
    if completion[0].message["role"] != "assistant":
        what, do = "a completion must begin with the assistant", "move what precedes it to the prompt"
        raise RowError(completion[0].role_place, what, do, shown(completion[0].message["role"]))
    check_prompt_not_repeated(prompt, [completion], "prompt_completion")
    turns = [*_history(row), *(_given(turn) for turn in prompt), *completion]
    return ParsedConversation(_with_system(row, turns), tools_of(row))


def text(row: Fields) -> ParsedText:
    """`text`: learned as a whole, without a chat template."""
    return ParsedText(row.text("text"))


def rendered(row: Fields) -> ParsedText:
    """`text` that already has its marks (`<s>[INST] ...`), which are read as tokens; never recognised by itself."""
    return ParsedText(row.text("text"), rendered=True)


def _question(row: Fields, further: str) -> Turn:
    turn, material = column_turn(row, "instruction", "user"), row.optional_text(further)
    if material is None:
        return turn
    message = Message(role="user", content=f"{turn.message['content']}\n\n{material}")
    return Turn(message, f"{turn.place} and {row.name(further)}")


def _question_and_answer(row: Fields, further: str, answer: str) -> list[Turn]:
    question, answered = _question(row, further), _with_reasoning(row, [column_turn(row, answer, "assistant")])
    check_prompt_not_repeated(_repeatable(row, question), [answered], "messages")
    return [question, *answered]


def _with_reasoning(row: Fields, answer: list[Turn]) -> list[Turn]:
    """The answer, with what the row's column of reasoning has for it."""
    place = row.name(REASONING)
    text = column_reasoning(row.optional(REASONING), place)
    if text is None:
        return answer
    if len(answer) > 1 or answer[0].message["role"] != "assistant":
        do = "write it into the message that it belongs to, under reasoning_content"
        raise RowError(place, "is the reasoning of one answer, and the row has messages", do, shown(text))
    message = answer[0].message
    check_same_reasoning(message.get("reasoning", text), text, answer[0].reasoning_place, place)
    return [answer[0]._replace(message=Message(**{**message, "reasoning": text}), reasoning_place=place)]


def _repeatable(row: Fields, question: Turn) -> list[Turn]:
    """What an answer may repeat: the question, and its instruction without the material."""
    has_material = question.place != row.name("instruction")
    return [column_turn(row, "instruction", "user"), question] if has_material else [question]


def _history(row: Fields) -> list[Turn]:
    value, place, turns = row.optional("history"), row.name("history"), []
    if says_nothing(value):
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, place)
    if not isinstance(value, list):
        raise RowError(place, "must be a list of pairs", "write [[instruction, output], ...]", shown(value))
    for i, pair in enumerate(value):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"{place}[{i}]", "must be a pair", "write [instruction, output]", shown(pair))
        for j, text in enumerate(pair):
            content = plain_text(text, f"{place}[{i}][{j}]")
            turns.append(Turn(Message(role="assistant" if j else "user", content=content), f"{place}[{i}][{j}]"))
    return turns


def _given(turn: Turn) -> Turn:
    """A turn of a prompt: given, not learned, unless the message itself says otherwise."""
    if turn.message["role"] != "assistant" or "train" in turn.message:
        return turn
    return turn._replace(message=Message(**{**turn.message, "train": False}))


TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")
TRUE, FALSE = ("true", "1"), ("false", "0")


def preference(row: Fields) -> ParsedPair:
    """`chosen` and `rejected`, both texts or both lists of messages; `prompt` likewise.

    Without `prompt` it is the messages that both lists begin with; with it the lists may repeat it.
    """
    chosen, rejected = (text_or_turns(row, field, "assistant") for field in ("chosen", "rejected"))
    places = row.name("chosen"), row.name("rejected")
    values = [row.text_or_messages(field) for field in ("chosen", "rejected")]
    if isinstance(values[0], str) != isinstance(values[1], str):
        what, do = f"is not of the same kind as {places[0]}", "write both as texts or both as lists of messages"
        raise RowError(places[1], what, do, shown(row.required("rejected")))
    check_scores(row)
    if row.optional("prompt") is not None:
        prompt = text_or_turns(row, "prompt", "user")
        check_prompt_not_repeated(prompt, [chosen, rejected], "preference")
        count = _repeated(prompt, chosen, rejected, row)
        return ParsedPair(chosen[:count] or prompt, chosen[count:], rejected[count:], places, tools_of(row))
    if isinstance(values[0], str):
        what = "is missing: two texts do not say where their prompt ends"
        raise RowError(row.name("prompt"), what, "add prompt, or name the format hh for Human/Assistant transcripts")
    return _split(chosen, rejected, places, row)


def ultrafeedback(row: Fields) -> ParsedPair:
    """`prompt` (text), `chosen` and `rejected` (messages that repeat it), `score_chosen` above `score_rejected`."""
    for field in ("chosen", "rejected"):
        if isinstance(row.text_or_messages(field), str):
            raise RowError(row.name(field), "must be a list of messages", "name the format preference", "text")
    row.text("prompt")
    for field in ("score_chosen", "score_rejected"):
        _score(row, field)  # raises where it is missing
    return preference(row)


SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
"""What columns with the scores of the two answers are called."""


def check_scores(row: Fields) -> None:
    """`RowError` where scores beside the answers say that the chosen one is not the better, whatever the format."""
    for chosen, rejected in SCORES:
        if row.optional(chosen) is None or row.optional(rejected) is None:
            continue
        better, worse = (_number(row.optional(field)) for field in (chosen, rejected))
        if better is not None and worse is not None and better <= worse:
            what = "no preference: both answers have this score" if better == worse else "is above the chosen answer's"
            raise RowError(row.name(rejected), what, "remove the row", f"{worse}, chosen {better}")


def alpaca_dpo(row: Fields) -> ParsedPair:
    """`instruction`, and after an empty line `input`, -> user; `chosen` and `rejected`: texts or one message each."""
    chosen, rejected = (text_or_turns(row, field, "assistant") for field in ("chosen", "rejected"))
    check_scores(row)
    question = _question(row, "input")
    prompt = _with_system(row, [*_history(row), question])
    asked = [turn for turn in prompt if turn.message["role"] == "system"] + _repeatable(row, question)
    check_prompt_not_repeated(asked, [chosen, rejected], "alpaca_dpo")
    return ParsedPair(prompt, chosen, rejected, (row.name("chosen"), row.name("rejected")))


def hh(row: Fields) -> ParsedPair:
    """`chosen` and `rejected`: transcripts of Human and Assistant; what both begin with is the prompt."""
    chosen, rejected = (_transcript(row, field) for field in ("chosen", "rejected"))
    check_scores(row)
    return _split(chosen, rejected, (row.name("chosen"), row.name("rejected")), row)


def orca_dpo(row: Fields) -> ParsedPair:
    """`system` (may be missing or empty), `question`, `chosen`, `rejected`: texts."""
    chosen, rejected = ([column_turn(row, field, "assistant")] for field in ("chosen", "rejected"))
    check_scores(row)
    prompt = _with_system(row, [column_turn(row, "question", "user")])
    check_prompt_not_repeated(prompt, [chosen, rejected], "preference")
    return ParsedPair(prompt, chosen, rejected, (row.name("chosen"), row.name("rejected")))


def sharegpt_dpo(row: Fields) -> ParsedPair:
    """`conversations` as in sharegpt, up to a user's turn or a tool's; `chosen` and `rejected`: one turn each."""
    chosen, rejected = ([_answer(row, field)] for field in ("chosen", "rejected"))
    check_scores(row)
    places = row.name("chosen"), row.name("rejected")
    return ParsedPair(sharegpt_turns(row), chosen, rejected, places, tools_of(row))


def _answer(row: Fields, field: str) -> Turn:
    return read_message(row.text_or_messages(field), row.name(field), row.roles, SHAREGPT)


def kto(row: Fields) -> ParsedJudgement:
    """`prompt`, `completion` (texts or messages), `label`: true if the completion is desirable; `system`, `history`."""
    prompt = text_or_turns(row, "prompt", "user")
    completion = text_or_turns(row, "completion", "assistant")
    check_prompt_not_repeated(prompt, [completion], "kto")
    return ParsedJudgement(
        _with_system(row, [*_history(row), *prompt]), completion, _label(row), row.name("completion")
    )


def _split(chosen: list[Turn], rejected: list[Turn], places: tuple[str, str], row: Fields) -> ParsedPair:
    """The prompt is what both answers begin with."""
    count = _shared(chosen, rejected)
    if not count:
        what = f"does not begin with the same message as {places[0]}, so there is no prompt"
        raise RowError(places[1], what, "add the prompt to both", shown(rejected[0].message["content"]))
    return ParsedPair(chosen[:count], chosen[count:], rejected[count:], places, tools_of(row))


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
    questions = {turn.message["content"] for turn in chosen[:count] if turn.message["role"] == "user"}
    if is_text and prompt[0].message["content"] in questions:
        return count  # the lists have more before it: a system message, earlier turns
    what = f"is not what {row.name('chosen')} and {row.name('rejected')} begin with"
    raise RowError(row.name("prompt"), what, "write the same prompt three times, or remove this one")


def _transcript(row: Fields, field: str) -> list[Turn]:
    text, place = row.text(field), row.name(field)
    before, *pieces = TRANSCRIPT.split(text)
    if before or not pieces:
        do = "write \\n\\nHuman: ...\\n\\nAssistant: ..., or name the data's true format"
        raise RowError(place, "is not a transcript that begins with Human", do, shown(text))
    turns = []
    for speaker, text in zip(pieces[::2], pieces[1::2], strict=True):
        content = checked_text(text.removeprefix(" "), place)
        turns.append(Turn(Message(role="user" if speaker == "Human" else "assistant", content=content), place))
    return turns


def _score(row: Fields, field: str) -> float:
    value = row.required(field)
    if (score := _number(value)) is None:
        raise RowError(row.name(field), "must be a number", "write the answer's score", shown(value))
    return score


def _number(value: object) -> float | None:
    """A finite number, or the text of one (CSV has texts only)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _label(row: Fields) -> bool:
    value = row.required("label")
    word = str(value).lower() if isinstance(value, bool | int | str) else ""  # CSV has texts only
    if word not in TRUE + FALSE:
        raise RowError(row.name("label"), "must be true or false", "write true for a desirable answer", shown(value))
    return word in TRUE


NODE = Spelling("role", "text")
ROLES: dict[str, Role] = {"prompter": "user", "assistant": "assistant"}
SPAM = 0.5


class UnusableRowError(RowError):
    """The row is surely of this format, in a form that cannot be used: so it is of no other format either."""


def oasst(row: Fields) -> ParsedConversation:
    """`prompt`: the root of a tree (text, role, replies); the best-ranked path, up to its last answer.

    Left out are messages deleted, rejected in review (`review_result: false`) or labelled spam. Rank 0 is the best;
    replies without a rank come after those that have one, in the file's order.
    """
    if row.name("prompt") not in row.row and {"message_id", "parent_id", "text"} <= row.row.keys():
        do = (
            "use the export of trees (one tree a line, file names with `trees`): a row must hold the whole conversation"
        )
        raise UnusableRowError(
            "parent_id", "the row is one message of an OpenAssistant tree", do, shown(row.row["parent_id"])
        )
    node, place, turns = _node(row.required("prompt"), row.name("prompt")), row.name("prompt"), []
    if _left_out(node):
        raise RowError(place, "the tree's prompt was deleted or is spam", "remove the row")
    while True:
        turns.append(_turn(node, place))
        replies = node.get("replies") or []
        if not isinstance(replies, list):
            raise RowError(
                f"{place}.replies", "must be a list of messages", "write [{text, role}, ...]", shown(replies)
            )
        candidates = [
            (_node(reply, f"{place}.replies[{i}]"), f"{place}.replies[{i}]") for i, reply in enumerate(replies)
        ]
        candidates = [(reply, where) for reply, where in candidates if not _left_out(reply)]
        if not candidates:
            return ParsedConversation(_until_last_answer(turns))
        node, place = min(candidates, key=lambda candidate: _rank(*candidate))


def _until_last_answer(turns: list[Turn]) -> list[Turn]:
    """Annotators stop anywhere: a last question that nobody answered holds nothing to learn."""
    if len(turns) > 1 and turns[-1].message["role"] != "assistant":
        return turns[:-1]
    return turns


def _node(value: object, place: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RowError(place, "must be a message with its replies", "write {text, role, replies}", shown(value))
    for key in (NODE.role, NODE.content):
        if value.get(key) is None:
            raise RowError(f"{place}.{key}", "is missing", "a message has text and role", f"keys {sorted(value)}")
    return value


def _turn(node: Mapping[str, Any], place: str) -> Turn:
    role = ROLES.get(node["role"]) if isinstance(node["role"], str) else None
    if role is None:
        raise RowError(f"{place}.role", "unknown role", f"use one of {', '.join(ROLES)}", shown(node["role"]))
    return Turn(Message(role=role, content=checked_text(node["text"], f"{place}.text")), place, NODE)


def _left_out(node: Mapping[str, Any]) -> bool:
    labels = node.get("labels")
    spam = labels.get("spam") if isinstance(labels, dict) else None
    value = spam.get("value") if isinstance(spam, dict) else None
    labelled_spam = isinstance(value, int | float) and value > SPAM
    return node.get("deleted") is True or node.get("review_result") is False or labelled_spam


def _rank(node: Mapping[str, Any], place: str) -> float:
    rank = node.get("rank")
    if rank is None:
        return float("inf")
    if isinstance(rank, bool) or not isinstance(rank, int | float) or not isfinite(rank):
        raise RowError(f"{place}.rank", "must be a number", "write 0 for the best reply, or null", shown(rank))
    return rank
