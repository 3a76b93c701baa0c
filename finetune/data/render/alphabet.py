"""Characters that a tokenizer loses without a word: those it has no token for, and the one it reads as a space."""

from typing import Any

from tokenizers import pre_tokenizers

from finetune.data.rows import RowError, shown

# GPT-2's table: byte -> the character that stands for it, in the order in which it was made.
_PLAIN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}


class Alphabet:
    """What a tokenizer cannot say, from its own JSON (`state`); `check` refuses a text that needs it."""

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
    """What stands for a space inside (SentencePiece's U+2581)."""
    for step in _steps(state["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace":
            return str(step["replacement"])
    for step in _steps(state["normalizer"], "normalizers"):
        if step["type"] == "Replace" and step["pattern"] == {"String": " "}:
            return str(step["content"])
    return None


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    return [] if part is None else list(part.get(inner, [part]))


def _table() -> dict[int, str]:
    table = {byte: chr(byte) for byte in _PLAIN}
    rest = [byte for byte in range(256) if byte not in table]
    table.update({byte: chr(256 + i) for i, byte in enumerate(rest)})
    assert set(table.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return table
