"""Decode token rows piece by piece: supervised or not, special token or not, with the token ids."""

import random
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from tokenizers.decoders import DecodeStream

from finetune.data.render import IGNORED
from finetune.data.tokens import RowSet
from finetune.data.tokens.packing import Indices
from finetune.data.types import Ints

HEAD_TOKENS, TAIL_TOKENS = 1500, 500
"""Tokens shown of the beginning and the end of a longer row."""
_CONTEXT = 16


@dataclass(frozen=True)
class Piece:
    """Text of one token, or of the tokens that together make a character; `ids` are theirs."""

    text: str
    ids: tuple[int, ...]
    supervised: bool
    special: bool = False
    left_out: int = 0  # number of tokens that are not shown here
    gap: str = "left out"  # the text for them


@dataclass(frozen=True)
class Sample:
    """One row as the model sees it; `where`: its `file:line`, and which answer of a pair it is."""

    where: str
    pieces: list[Piece]
    tokens: int
    supervised: int


def draw(rows: RowSet, chosen: Indices, number: int, seed: int, tokenizer: Any) -> list[Sample]:
    """`number` of the chosen rows (or all) drawn with `seed`, in file order; both answers of a pair."""
    table = rows.table()
    # random.sample draws from a range without making it a list.
    drawn = random.Random(seed).sample(range(len(chosen)), min(number, len(chosen)))
    samples = []
    for index in sorted({int(chosen[position]) for position in drawn}):
        columns, where = table.row(index)
        if len(columns) == 2:
            samples.append(sample_of(where, columns[0], columns[1], tokenizer))
        else:
            samples += _pair(where, columns, tokenizer)
    return samples


def sample_of(where: str, ids: Ints, labels: Ints, tokenizer: Any) -> Sample:
    """A row of tokens."""
    supervised = _supervised(labels)
    return Sample(where, pieces(ids.tolist(), supervised, tokenizer), len(ids), sum(supervised))


def _supervised(labels: Ints) -> list[bool]:
    return [label != IGNORED for label in labels.tolist()]


def _pair(where: str, columns: Sequence[Ints], tokenizer: Any) -> list[Sample]:
    """The prompt with the chosen answer, and the rejected answer, before which the prompt is not shown again."""
    prompt, chosen, chosen_labels, rejected, rejected_labels = columns
    before = np.full(len(prompt), IGNORED, dtype=np.int32)
    ids, labels = np.concatenate([prompt, chosen]), np.concatenate([before, chosen_labels])
    first = sample_of(f"{where} chosen", ids, labels, tokenizer)
    # With a few tokens of the prompt, because the text of a token may depend on the one before it. A piece ends where
    # the prompt ends, because the first token of an answer is supervised.
    context, supervised = prompt[-_CONTEXT:].tolist(), _supervised(rejected_labels)
    decoded = pieces([*context, *rejected.tolist()], [False] * len(context) + supervised, tokenizer)
    left = len(context)
    while left:
        left -= len(decoded.pop(0).ids)
    same = Piece("", (), False, left_out=len(prompt), gap="of the same prompt")
    second = Sample(f"{where} rejected", [same, *decoded], len(prompt) + len(rejected), sum(supervised))
    return [first, second]


def pieces(ids: Sequence[int], supervised: Sequence[bool], tokenizer: Any) -> list[Piece]:
    """A row, cut in the middle if it is long."""
    left_out = len(ids) - HEAD_TOKENS - TAIL_TOKENS
    if left_out <= 0:
        return list(_decoded(ids, supervised, tokenizer))
    head = list(_decoded(ids[:HEAD_TOKENS], supervised[:HEAD_TOKENS], tokenizer))
    tail = list(_decoded(ids[-TAIL_TOKENS:], supervised[-TAIL_TOKENS:], tokenizer))
    return [*head, Piece("", (), False, left_out=left_out), *tail]


def _decoded(ids: Sequence[int], supervised: Sequence[bool], tokenizer: Any) -> Iterator[Piece]:
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    # The library's own token-by-token decoder: it holds bytes back until they form a character.
    stream, start = DecodeStream(skip_special_tokens=False), 0
    whole: Sequence[int] = ()  # the last tokens that formed characters: a new stream must not start within one
    for end, token_id in enumerate(ids, start=1):
        if start < end - 1 and (token_id in special or supervised[end - 1] != supervised[start]):
            # Bytes that are held back do not belong to the next token: an incomplete character, or U+FFFD itself.
            yield _piece(ids[start : end - 1], supervised[start], tokenizer)
            stream, start = DecodeStream(ids=list(whole), skip_special_tokens=False), end - 1
        text = stream.step(tokenizer.backend_tokenizer, token_id)
        if text is not None:
            yield Piece(text, tuple(ids[start:end]), supervised[start], token_id in special)
            start, whole = end, ids[start:end]
    if start < len(ids):
        yield _piece(ids[start:], supervised[start], tokenizer)


def _piece(ids: Sequence[int], supervised: bool, tokenizer: Any) -> Piece:
    return Piece(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False), tuple(ids), supervised)


def shown(pieces: Sequence[Piece]) -> list[str]:
    """The texts of neighbouring pieces for display: control characters, bidirectional marks and line ends are replaced
    by visible ones, and spaces where they would be overlooked."""
    texts = ["".join(map(_visible, piece.text)) for piece in pieces]
    dotted = iter(_UNSEEN_SPACES.sub(lambda match: "·" * len(match[0]), "".join(texts)))
    return ["".join(islice(dotted, len(text))).replace("\n", "⏎\n") for text in texts]


def printable(text: str) -> str:
    """A text on one line that changes nothing on a terminal: its control characters are replaced by visible ones."""
    return "".join(map(_visible, text)).replace("\n", "⏎")


_UNSEEN_SPACES = re.compile(r"^ +| +$|  +", re.MULTILINE)
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def _visible(character: str) -> str:
    if character == "\n":
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)  # the pictures of control characters
    if character in _BIDI or unicodedata.category(character) in ("Cc", "Cs", "Cn", "Zl", "Zp"):
        return f"<U+{code:04X}>"
    return character
