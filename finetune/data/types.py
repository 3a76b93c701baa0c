"""The forms of a row: a conversation, document, preference or judged answer; then its text; then its tokens."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


class Function(TypedDict):
    """What a tool call names: `arguments` is the parsed object, never its JSON text."""

    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    """One call of an assistant message, as OpenAI writes it."""

    type: Literal["function"]
    function: Function
    id: NotRequired[str]


class Message(TypedDict):
    """One turn. `content` is text, empty only beside `tool_calls`; `train: False` takes it out of the loss."""

    role: Role
    content: str
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
    """Plain text: no turns, no chat template."""

    text: str


@dataclass(frozen=True)
class Preference:
    """Two ways to go on after `prompt`, each a list of turns that begins with the assistant; `chosen` is the better."""

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


Example = Conversation | Document | Preference | Judged


Ints = npt.NDArray[np.int32]
LossOn = Literal["assistant", "last_assistant", "completion", "all"]

IGNORED = -100
"""Label of a token that is not supervised; PyTorch's cross entropy leaves it out."""


class Answer(NamedTuple):
    """A supervised turn: its number, and its characters in the text, from the prompt's end through its EOS."""

    message: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Rendering:
    """One row as text, before any tokenizer.

    `answers` are the supervised turns in order; `everything` (loss on all): all characters are supervised, the
    `holes` [start, end) excepted. A `document` gets its BOS and EOS as ids: they do not stand in `text`.
    """

    text: str
    answers: tuple[Answer, ...] = ()
    everything: bool = False
    holes: tuple[tuple[int, int], ...] = ()
    document: bool = False


@dataclass(frozen=True, slots=True)
class Rendered:
    """One row as tokens: `input_ids` and `labels` (int32, as long; `IGNORED`: no loss), not shifted."""

    input_ids: Ints
    labels: Ints
