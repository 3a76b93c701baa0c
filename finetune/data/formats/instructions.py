"""Formats of one question and one answer a row, and plain text."""

from finetune.data.formats.drafts import Plain, Talk
from finetune.data.formats.fields import Fields, checked_text
from finetune.data.formats.turns import Turn, column_turn, text_or_turns
from finetune.data.rows import RowError, shown
from finetune.data.types import Message


def alpaca(row: Fields) -> Talk:
    """`instruction`, and after an empty line `input`, -> user; `output` -> assistant; `history`: earlier pairs."""
    return Talk([*_system(row), *_history(row), _question(row, "input"), column_turn(row, "output", "assistant")])


def dolly(row: Fields) -> Talk:
    """`instruction`, and after an empty line `context`, -> user; `response` -> assistant."""
    return Talk([_question(row, "context"), column_turn(row, "response", "assistant")])


def prompt_completion(row: Fields) -> Talk:
    """`prompt` and `completion`, each a text or a list of messages; what the prompt's assistant says is not learned."""
    prompt = text_or_turns(row, "prompt", "user")
    completion = text_or_turns(row, "completion", "assistant")
    if completion[0].message["role"] != "assistant":
        what, do = "a completion must begin with the assistant", "move what precedes it to the prompt"
        raise RowError(completion[0].role_place, what, do, shown(completion[0].message["role"]))
    return Talk([*(_given(turn) for turn in prompt), *completion])


def text(row: Fields) -> Plain:
    """`text`: learned as a whole, without a chat template."""
    return Plain(row.text("text"))


def _question(row: Fields, further: str) -> Turn:
    turn, material = column_turn(row, "instruction", "user"), row.optional_text(further)
    if material is None:
        return turn
    message = Message(role="user", content=f"{turn.message['content']}\n\n{material}")
    return Turn(message, f"{turn.place} and {row.name(further)}")


def _system(row: Fields) -> list[Turn]:
    return [] if row.optional_text("system") is None else [column_turn(row, "system", "system")]


def _history(row: Fields) -> list[Turn]:
    value, place, turns = row.optional("history"), row.name("history"), []
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowError(place, "must be a list of pairs", "write [[instruction, output], ...]", shown(value))
    for i, pair in enumerate(value):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"{place}[{i}]", "must be a pair", "write [instruction, output]", shown(pair))
        for j, said in enumerate(pair):
            content = checked_text(said, f"{place}[{i}][{j}]")
            turns.append(Turn(Message(role="assistant" if j else "user", content=content), f"{place}[{i}][{j}]"))
    return turns


def _given(turn: Turn) -> Turn:
    """A turn of a prompt: given, not learned, unless the message itself says otherwise."""
    if turn.message["role"] != "assistant" or "train" in turn.message:
        return turn
    return turn._replace(message=Message(**{**turn.message, "train": False}))
