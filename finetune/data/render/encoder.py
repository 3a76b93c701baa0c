"""Text -> token ids on the Rust tokenizer, and which token begins at a character: without offsets, without loops.

Where generation's prompt ends, a token must end, and the tokens before must be those that the prompt alone becomes.
Three proofs of that, cheapest first:

1. Special tokens cut the text before anything else happens to it, so the tokens up to one depend on nothing behind
   it. If the prompt ends with a special token and a short text after it (ChatML's `assistant` line) whose tokens are
   known, comparing these few is enough.
2. BPE over the whole text with one merge order (Mistral v1): a merge once made stays, so where a token ends, no merge
   ever crossed, and the tokens on one side would be the same without the other. The lengths of the pieces say where.
3. Else the prompt is tokenised by itself and compared.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from finetune.data.row_errors import RowError, shown
from finetune.data.types import Ints
from finetune.model_files import reading

MAX_TRIED = 1 << 25
"""Characters of all prompts of one row that are tokenised for proof 3."""
TOO_MANY = -1
_FAILS, _ANOTHER = "fails at the text of a row", "use the tokenizer of another checkpoint"
_ANY_TEXT = "What is 2+2?"
_STEPS = ("normalizer", "pre_tokenizer")
_MODEL = ("dropout", "unk_token", "byte_fallback", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
_ADDED = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def bare_copy(backend: Tokenizer) -> Tokenizer:
    """A tokenizer with the same vocabulary (shared) and settings of its own: no padding, truncation or special tokens.

    What is set on `backend` afterwards does not reach it.
    """
    copy = Tokenizer(backend.model)
    for step in (*_STEPS, "decoder"):
        if getattr(backend, step) is not None:
            setattr(copy, step, getattr(backend, step))
    added = backend.get_added_tokens_decoder()
    # As reading the JSON does: in the order of their numbers each gets the number it had.
    copy.add_tokens([added[number] for number in sorted(added)])
    return copy


def state_of(backend: Tokenizer) -> dict[str, Any]:
    """Of the JSON of a tokenizer what decides how text becomes tokens, the merges themselves excepted."""
    steps = {step: getattr(backend, step) for step in _STEPS}
    model, added = backend.model, backend.get_added_tokens_decoder()
    return {
        **{name: None if step is None else json.loads(step.__getstate__()) for name, step in steps.items()},
        "model": {
            "type": type(model).__name__,
            "vocab": backend.get_vocab(with_added_tokens=False),
            **{name: getattr(model, name, None) for name in _MODEL},
        },
        "added_tokens": [
            {"id": number, **{name: getattr(added[number], name) for name in _ADDED}} for number in sorted(added)
        ],
    }


# GPT-2's table: byte -> the character that represents it, in the order in which it was made.
_PLAIN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}


class Alphabet:
    """The characters that a tokenizer cannot represent, from its JSON (`state`); `check` rejects texts with them."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.dropped = _dropped_bytes(state)
        self.space = _space_sign(state)

    def check(self, text: str) -> None:
        """Raise `RowError` where `decode(encode(text))` would be another text."""
        if self.space is not None and self.space in text:
            raise _lost(text, self.space, "which the tokenizer reads as a space")
        if self.dropped:
            data = text.encode()
            if len(data.translate(None, self.dropped)) != len(data):
                lost = next(sign for sign in text if any(byte in self.dropped for byte in sign.encode()))
                raise _lost(text, lost, "for which the tokenizer has no token: it would be dropped")


def _lost(text: str, character: str, why: str) -> RowError:
    place = text.index(character)
    got = shown(ascii(text[max(0, place - 20) : place + 20])[1:-1])
    return RowError(None, f"contains U+{ord(character):04X}, {why}", "remove the character", got)


def _dropped_bytes(state: dict[str, Any]) -> bytes:
    """The bytes of UTF-8 text that a byte-level BPE has no token for; empty for other tokenizers."""
    model = state["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("unk_token"):
        return b""
    if not any(step["type"] == "ByteLevel" for step in _steps(state["pre_tokenizer"], "pretokenizers")):
        return b""
    known = model["vocab"]
    return bytes(byte for byte, sign in _table().items() if sign not in known and byte not in _NEVER_IN_UTF8)


def _space_sign(state: dict[str, Any]) -> str | None:
    """The character that replaces a space (SentencePiece's U+2581)."""
    for step in _steps(state["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace":
            return str(step["replacement"])
    for step in _steps(state["normalizer"], "normalizers"):
        if step["type"] == "Replace" and step["pattern"] == {"String": " "}:
            return str(step["content"])
    return None


def _adds_space(state: dict[str, Any]) -> bool:
    """Whether a space may be put before every text, so that two parts of one cannot be tokenised one by one."""
    steps = [*_steps(state["pre_tokenizer"], "pretokenizers"), *_steps(state["normalizer"], "normalizers")]
    return any(step["type"] in ("Metaspace", "Prepend") or step.get("add_prefix_space") for step in steps)


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    return [] if part is None else list(part.get(inner, [part]))


def _table() -> dict[int, str]:
    table = {byte: chr(byte) for byte in _PLAIN}
    rest = [byte for byte in range(256) if byte not in table]
    table.update({byte: chr(256 + i) for i, byte in enumerate(rest)})
    assert set(table.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return table


SPACE = "\u2581"


class PieceLengths:
    """Character lengths of the pieces of a BPE without pre-tokenizer (SentencePiece's kind: Mistral v1, v2, v3)."""

    def __init__(self, lengths: Ints, special: np.ndarray[Any, np.dtype[np.bool_]], prepends: str) -> None:
        self._lengths = lengths
        self._special = special
        self._prepends = prepends

    @classmethod
    def of(cls, state: dict[str, Any]) -> Self | None:
        """From a tokenizer's own JSON; None where anything in it could make the lengths or the proof untrue."""
        model, vocabulary = state["model"], state["model"].get("vocab")
        prepends = _prepends(state)
        if prepends is None or not _merges_only(model) or not isinstance(vocabulary, dict):
            return None
        pieces = {**vocabulary, **{token["content"]: token["id"] for token in state["added_tokens"]}}
        size = max(pieces.values()) + 1
        lengths, special = np.zeros(size, dtype=np.int32), np.zeros(size, dtype=np.bool_)
        for piece, index in pieces.items():
            lengths[index] = len(piece)
        for byte in range(256):
            # A character of several bytes is counted with its first one.
            lengths[vocabulary[f"<0x{byte:02X}>"]] = not 0x80 <= byte < 0xC0
        for token in state["added_tokens"]:
            special[token["id"]] = True
        return cls(lengths, special, prepends)

    def ends(self, text: str, ids: Ints) -> Ints:
        """Past-the-last character of each token; empty if they do not add up to the text."""
        lengths = self._lengths[ids]
        if self._prepends == "every":
            special = self._special[ids]
            lengths[1:] -= special[:-1] & ~special[1:]
            lengths[:1] -= ~special[:1]
        elif self._prepends == "first" and len(ids) and not self._special[ids[0]] and text[0] not in (" ", SPACE):
            lengths[0] -= 1
        ends = np.cumsum(lengths, dtype=np.int32)
        return ends if len(ends) and ends[-1] == len(text) else ends[:0]

    def border(self, ids: Ints, ends: Ints, character: int) -> int | None:
        """How many tokens end by `character`, if one ends right there."""
        first = int(np.searchsorted(ends, character, side="left"))
        if first == len(ends) or ends[first] != character:
            return None
        if self._special[ids[first]]:
            return first + 1  # a space put in behind it, of no length, belongs to what follows
        return int(np.searchsorted(ends, character, side="right"))  # with all bytes of the last character


def _merges_only(model: dict[str, Any]) -> bool:
    """Whether nothing but merges in one order makes the tokens, and no character is ever unknown."""
    vocabulary = model.get("vocab", {})
    return (
        model["type"] == "BPE"
        and not model.get("dropout")
        and not model.get("ignore_merges")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and bool(model.get("byte_fallback"))
        and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    )


def _prepends(state: dict[str, Any]) -> str | None:
    """Where a space is put before a text: `none`, at the `first` character, or in `every` part between special tokens.

    None where the text is changed in any other way than space -> U+2581, or cut into words.
    """
    normalizer, cut = state["normalizer"], state["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if cut is None and steps in ([replace], [prepend, replace]):
        return "every" if prepend in steps else "none"
    if not steps and cut is not None and cut["type"] == "Metaspace" and cut["replacement"] == SPACE:
        schemes = {"first": "first", "never": "none"}
        return None if cut.get("split", True) else schemes.get(cut["prepend_scheme"])
    return None


class Tail(NamedTuple):
    """How prompts end: the text from their last special token on, that token, and the ids of it all."""

    text: str
    token: str
    ids: list[int]


class _Places(NamedTuple):
    """Where a special token stands: past its last character in the text each time, and in the ids."""

    ends: list[int]
    tokens: Ints

    def before(self, character: int) -> int:
        """The token of the last one that ends at this character or before."""
        return int(self.tokens[bisect_right(self.ends, character) - 1])


class Encoder:
    """Tokenises without adding special tokens, as `apply_chat_template` does; its settings are its own.

    `control` are the special tokens that only the template writes.
    """

    def __init__(self, tokenizer: Any, control: Sequence[str]) -> None:
        # A copy: padding and truncation set on the other one, and its offsets' trimming, must not matter here.
        self._backend = bare_copy(tokenizer.backend_tokenizer)
        state = state_of(tokenizer.backend_tokenizer)
        plain = {token["content"] for token in state["added_tokens"] if _cuts_plainly(token)}
        self._cuts = [token for token in control if token in plain]
        self._lengths = PieceLengths.of(state) if len(plain) == len(state["added_tokens"]) else None
        self.adds_space = _adds_space(state)
        self._tails: list[Tail] = []
        self.alphabet = Alphabet(state)

    def ids(self, texts: Sequence[str]) -> list[Ints]:
        """The ids of each text."""
        with reading("tokenizer.json", _FAILS, _ANOTHER):
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """First and past-the-last character of each token."""
        with reading("tokenizer.json", _FAILS, _ANOTHER):
            offsets: list[tuple[int, int]] = self._backend.encode(text, add_special_tokens=False).offsets
        return offsets

    def learn(self, prompt: str, content: str) -> None:
        """Remember how prompts end, from one after a turn that says `content`; nothing where that is in between."""
        cut, token = max(((prompt.rfind(token), token) for token in self._cuts), default=(-1, ""))
        tail = prompt[cut:]
        if cut < 0 or content in tail or any(known.text == tail for known in self._tails):
            return
        self._tails.append(Tail(tail, token, self.ids([tail])[0].tolist()))

    def borders(self, text: str, ids: Ints, characters: Iterable[int]) -> list[int | None]:
        """For each character, where a prompt ends: how many tokens it becomes, if proven; None if it must be tried."""
        places: dict[str, _Places | None] = {}
        ends: Ints | None = None
        borders: list[int | None] = []
        for character in characters:
            border = self._after_tail(text, ids, character, places)
            if border is None and self._lengths is not None:
                ends = self._lengths.ends(text, ids) if ends is None else ends
                border = self._lengths.border(ids, ends, character)
            borders.append(border)
        return borders

    def prompt_borders(
        self, texts: Sequence[str], rows: Sequence[Ints], characters: Sequence[Sequence[int]]
    ) -> list[list[int | None]]:
        """For each text and character, where a prompt ends: how many tokens it becomes; None if a token straddles it.

        What is not proven is tried: these prompts are tokenised and compared. `TOO_MANY` where they are too long.
        """
        borders = [self.borders(*row) for row in zip(texts, rows, characters, strict=True)]
        unproven = []
        for row, places in enumerate(borders):
            tried = [place for place, border in enumerate(places) if border is None]
            if sum(characters[row][place] for place in tried) > MAX_TRIED:
                borders[row] = [TOO_MANY] * len(places)
            else:
                unproven += [(row, place) for place in tried]
        prompts = [texts[row][: characters[row][place]] for row, place in unproven]
        for (row, place), ids in zip(unproven, self.ids(prompts) if prompts else [], strict=True):
            if np.array_equal(rows[row][: len(ids)], ids):
                borders[row][place] = len(ids)
        return borders

    def _after_tail(self, text: str, ids: Ints, character: int, places: dict[str, _Places | None]) -> int | None:
        for tail in self._tails:
            if text.endswith(tail.text, 0, character):
                if tail.token not in places:
                    places[tail.token] = _places(text, ids, tail)
                where = places[tail.token]
                if where is None:
                    continue
                first = where.before(character)
                end = first + len(tail.ids)
                if len(tail.ids) == 1 or ids[first:end].tolist() == tail.ids:
                    return end
        return None


def _places(text: str, ids: Ints, tail: Tail) -> _Places | None:
    """The places of the tail's special token; None if it is not one token each time it is written."""
    ends = [match.end() for match in re.finditer(re.escape(tail.token), text)]
    tokens = np.flatnonzero(ids == tail.ids[0]).astype(np.int32)
    return _Places(ends, tokens) if len(tokens) == len(ends) else None


def own_bos(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer itself puts before a text: its BOS, or nothing."""
    framed, bare = (list(tokenizer(_ANY_TEXT, add_special_tokens=add)["input_ids"]) for add in (True, False))
    return framed[: framed.index(bare[0])]


def _cuts_plainly(token: dict[str, Any]) -> bool:
    """Whether an added token is found in the text as it is written, and takes no characters around it."""
    return not (token["lstrip"] or token["rstrip"] or token["single_word"] or token["normalized"])
