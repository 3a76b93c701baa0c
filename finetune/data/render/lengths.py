"""How many characters each piece of a vocabulary stands for, where every character becomes exactly one."""

from typing import Any, Self

import numpy as np

from finetune.data.render.rendering import Ints

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
