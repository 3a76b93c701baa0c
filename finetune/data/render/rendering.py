"""What rendering gives: text with the places of its answers, then token ids with labels."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

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
