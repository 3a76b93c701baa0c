"""The parsed form of a row: turns with their places in the file. `content` checks them and drops the places."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from finetune.data.formats.messages import Turn, check_order, roles_of
from finetune.data.formats.tools import check_arguments
from finetune.data.row_errors import RowError, shown
from finetune.data.types import Conversation, Document, Judged, Message, Preference, RowContent

Tools = list[dict[str, Any]] | None


class Parsed(Protocol):
    """One form of row content before its checks."""

    def content(self) -> RowContent:
        """The content; `RowError` at the file's own place."""

    @property
    def parts(self) -> Mapping[str, Sequence[Turn]]:
        """The turns by the field of the content that they become."""


@dataclass(frozen=True)
class ParsedConversation:
    """-> `Conversation`."""

    turns: list[Turn]
    tools: Tools = None

    @property
    def parts(self) -> Mapping[str, Sequence[Turn]]:
        """See `Parsed`."""
        return {"messages": self.turns}

    def content(self) -> Conversation:
        """See `Parsed`."""
        check_order(self.turns)
        answers = [turn for turn in self.turns if turn.message["role"] == "assistant"]
        if all(turn.message.get("train") is False for turn in answers):
            do = "let at least one count, or remove the row"
            raise RowError(answers[-1].place, "no assistant message is learned (train: false or weight 0)", do)
        _check_calls(self.turns, self.tools)
        return Conversation(_messages(self.turns), self.tools)


@dataclass(frozen=True)
class ParsedText:
    """-> `Document`."""

    text: str
    rendered: bool = False

    @property
    def parts(self) -> Mapping[str, Sequence[Turn]]:
        """See `Parsed`."""
        return {}

    def content(self) -> Document:
        """See `Parsed`."""
        return Document(self.text, self.rendered)


@dataclass(frozen=True)
class ParsedPair:
    """-> `Preference`. `places`: the columns of the two answers."""

    prompt: list[Turn]
    chosen: list[Turn]
    rejected: list[Turn]
    places: tuple[str, str]
    tools: Tools = None

    @property
    def parts(self) -> Mapping[str, Sequence[Turn]]:
        """See `Parsed`."""
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}

    def content(self) -> Preference:
        """See `Parsed`."""
        if _messages(self.chosen) == _messages(self.rejected):
            do = "remove the row: it does not say which answer is better"
            raise RowError(self.places[1], f"is the same answer as {self.places[0]}", do)
        for answer, place in zip((self.chosen, self.rejected), self.places, strict=True):
            check_answer(self.prompt, answer, place)
            _check_calls([*self.prompt, *answer], self.tools)
        return Preference(_messages(self.prompt), _messages(self.chosen), _messages(self.rejected), self.tools)


@dataclass(frozen=True)
class ParsedJudgement:
    """-> `Judged`. `place`: the column of the answer."""

    prompt: list[Turn]
    completion: list[Turn]
    desirable: bool
    place: str

    @property
    def parts(self) -> Mapping[str, Sequence[Turn]]:
        """See `Parsed`."""
        return {"prompt": self.prompt, "completion": self.completion}

    def content(self) -> Judged:
        """See `Parsed`."""
        check_answer(self.prompt, self.completion, self.place)
        return Judged(_messages(self.prompt), _messages(self.completion), self.desirable)


def check_answer(prompt: Sequence[Turn], answer: Sequence[Turn], place: str) -> None:
    """An answer begins with the assistant's turn, and follows its prompt in the order of roles."""
    if not answer or answer[0].message["role"] != "assistant":
        where, got = (answer[0].role_place, roles_of(answer)) if answer else (place, None)
        raise RowError(where, "an answer must begin with the assistant", "move what precedes it to the prompt", got)
    check_order([*prompt, *answer])
    for turn in answer:
        if turn.message.get("train") is False:
            what = "a message of a judged answer cannot be left out (train: false or weight 0)"
            raise RowError(turn.place, what, "remove train and weight")


LONG_WORDS, LONG_BYTES = 3, 30
"""Fewer words may stand at the start of a good answer ("Good morning!"); bytes are for text without spaces."""


def check_prompt_not_repeated(prompt: Sequence[Turn], answers: Sequence[Sequence[Turn]], lists: str) -> None:
    """`RowError` if every answer is a text that begins with the whole prompt, which would be read twice.

    Answers in lists of messages are taken as they are written; `lists` is a format that has them.
    """
    if not all(answer[0].spelling is None for answer in answers):
        return
    for asked in (turn for turn in prompt if turn.message["role"] != "assistant"):
        if all(_begins_with(answer[0].message["content"], asked.message["content"]) for answer in answers):
            what = f"begins with the text of {asked.content_place}, which would be read twice"
            first, places = answers[0][0], " and ".join(answer[0].place for answer in answers)
            do = f"remove it from {places}; an answer that is to repeat it is written as messages (format {lists})"
            raise RowError(first.place, what, do, shown(first.message["content"]))


def _begins_with(answer: str, prompt: str) -> bool:
    """Whether a prompt long enough to tell, and then something else, stands at the start of the answer."""
    answer, prompt = answer.lstrip(), prompt.strip()
    if not answer.startswith(prompt):
        return False
    rest = answer[len(prompt) :]
    is_long = len(prompt.split(maxsplit=LONG_WORDS)) >= LONG_WORDS or len(prompt.encode()) >= LONG_BYTES
    return is_long and bool(rest.strip()) and not (prompt[-1].isalnum() and rest[0].isalnum())


def _check_calls(turns: Sequence[Turn], tools: Tools) -> None:
    for turn in turns if tools else ():
        for i, call in enumerate(turn.message.get("tool_calls", ())):
            check_arguments(call, tools or [], turn.call_places[i])


def _messages(turns: Sequence[Turn]) -> list[Message]:
    return [turn.message for turn in turns]
