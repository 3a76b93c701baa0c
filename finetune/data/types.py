"""The forms of a row: a conversation, document, preference or judged answer; then its text; then its tokens."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, get_args

import numpy as np
import numpy.typing as npt

from finetune.recipe.row_formats import Role

ROLES: tuple[Role, ...] = get_args(Role)


class WrittenFloat(float):
    """A number of a JSON file with its spelling there: as an answer, 1.10 is not 1.1."""

    __slots__ = ("text",)  # a third of the memory: a row may hold millions

    text: str

    def __new__(cls, text: str) -> "WrittenFloat":
        """The number that `text` spells."""
        number = super().__new__(cls, text)
        number.text = text
        return number


REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""The names under which messages have reasoning and chat templates read it."""


class Function(TypedDict):
    """The function of a tool call: `arguments` is the parsed object, never its JSON text."""

    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    """One call of an assistant message, as OpenAI writes it."""

    type: Literal["function"]
    function: Function
    id: NotRequired[str]


class Message(TypedDict):
    """One turn. `content` is text, empty only beside `tool_calls`; `train: False` takes it out of the loss.

    `reasoning` is what an assistant wrote before its content, without white space around it; absent if there is none.
    """

    role: Role
    content: str
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]
    train: NotRequired[bool]


@dataclass(frozen=True)
class Conversation:
    """Turns in order and the tools (JSON schemas, as OpenAI writes them) that the assistant may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Document:
    """Plain text: no turns, no chat template. `rendered`: marks in it are read as tokens."""

    text: str
    rendered: bool = False


@dataclass(frozen=True)
class Preference:
    """Two continuations of `prompt`, each a list of turns that begins with the assistant; `chosen` is the better."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Judged:
    """One answer with a thumb up or down (KTO); two of them on one prompt can make a `Preference`."""

    prompt: list[Message]
    completion: list[Message]
    desirable: bool


RowContent = Conversation | Document | Preference | Judged


def contents_of(example: RowContent) -> list[str]:
    """The texts of all messages, the reasoning among them, or the document."""
    if isinstance(example, Document):
        return [example.text]
    if isinstance(example, Conversation):
        messages = example.messages
    elif isinstance(example, Preference):
        messages = [*example.prompt, *example.chosen, *example.rejected]
    else:
        assert isinstance(example, Judged)
        messages = [*example.prompt, *example.completion]
    return [text for message in messages for text in (message.get("reasoning"), message["content"]) if text is not None]


Ints = npt.NDArray[np.int32]

IGNORED = -100
"""Label of a token that is not supervised; PyTorch's cross entropy leaves it out."""


class Answer(NamedTuple):
    """A supervised turn: its number, and its characters in the text, from the prompt's end through its end token.

    `reasoning`: the characters of its reasoning, if it has any. `alone`: white space that the template writes stands on
    both sides of `start`, so that the text is tokenised in two parts there, as generation does it.
    """

    message: int
    start: int
    end: int
    end_token: str = ""
    reasoning: tuple[int, int] | None = None
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Rendering:
    """One row as text, before any tokenizer.

    `answers` are the supervised turns in order; `everything` (loss on all): all characters are supervised, the
    `holes` [start, end) excepted. A `document` gets its BOS and EOS as ids: they are not in `text`.
    """

    text: str
    answers: tuple[Answer, ...] = ()
    everything: bool = False
    holes: tuple[tuple[int, int], ...] = ()
    document: bool = False


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """A text, or a piece of it, as tokens (int32). A label is the id of its own token, or `IGNORED`: not shifted.

    `prompt`: so many tokens stand before the first answer, whose own first tokens may be without loss; None if nothing
    says so but the labels.
    """

    input_ids: Ints
    labels: Ints
    prompt: int | None = None

    @property
    def columns(self) -> tuple[Ints, ...]:
        """The token columns as they are written."""
        return self.input_ids, self.labels

    @property
    def tokens(self) -> int:
        """Tokens that the model reads."""
        return len(self.input_ids)

    @property
    def supervised(self) -> int:
        """Tokens that carry a loss."""
        return int(np.count_nonzero(self.labels != IGNORED))


@dataclass(frozen=True, slots=True)
class TokenPair:
    """Two answers to one prompt as tokens, int32 throughout. A whole conversation is `prompt_ids` and then one answer.

    `prompt_ids` are what generation is given: the same for both answers, at least one token, none of them supervised.
    `chosen_labels` and `rejected_labels` are as long as their ids: the id where the token is supervised, else -100 (a
    tool's result between two turns, say), NOT shifted; each has at least one supervised token. `row` is `file:line`.
    """

    prompt_ids: Ints
    chosen_ids: Ints
    chosen_labels: Ints
    rejected_ids: Ints
    rejected_labels: Ints
    row: str

    @property
    def answers(self) -> tuple[tuple[Ints, Ints], tuple[Ints, Ints]]:
        """(ids, labels) of the chosen and of the rejected answer."""
        return (self.chosen_ids, self.chosen_labels), (self.rejected_ids, self.rejected_labels)

    @property
    def columns(self) -> tuple[Ints, ...]:
        """The token columns as they are written."""
        return self.prompt_ids, self.chosen_ids, self.chosen_labels, self.rejected_ids, self.rejected_labels

    @property
    def tokens(self) -> int:
        """Tokens that the model reads: of both conversations, each with the prompt."""
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)

    @property
    def supervised(self) -> int:
        """Tokens that carry a loss, of both answers."""
        return sum(int(np.count_nonzero(labels != IGNORED)) for labels in (self.chosen_labels, self.rejected_labels))
