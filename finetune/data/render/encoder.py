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

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from finetune.data.render.alphabet import Alphabet
from finetune.data.render.backend import bare_copy, state_of
from finetune.data.render.lengths import PieceLengths
from finetune.data.render.rendering import Ints


class Tail(NamedTuple):
    """How prompts end: the text from their last special token on, that token, and the ids of it all."""

    text: str
    token: str
    ids: list[int]


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
        self._tails: list[Tail] = []
        self.alphabet = Alphabet(state)

    def ids(self, texts: Sequence[str]) -> list[Ints]:
        """The ids of each text."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """First and past-the-last character of each token."""
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
        places: dict[str, Ints | None] = {}
        ends: Ints | None = None
        found: list[int | None] = []
        for character in characters:
            border = self._after_tail(text, ids, character, places)
            if border is None and self._lengths is not None:
                ends = self._lengths.ends(text, ids) if ends is None else ends
                border = self._lengths.border(ids, ends, character)
            found.append(border)
        return found

    def _after_tail(self, text: str, ids: Ints, character: int, places: dict[str, Ints | None]) -> int | None:
        for tail in self._tails:
            if text.endswith(tail.text, 0, character):
                if tail.token not in places:
                    places[tail.token] = _places(text, ids, tail)
                where = places[tail.token]
                if where is None:
                    continue
                first = int(where[text.count(tail.token, 0, character) - 1])
                end = first + len(tail.ids)
                if len(tail.ids) == 1 or ids[first:end].tolist() == tail.ids:
                    return end
        return None


def _places(text: str, ids: Ints, tail: Tail) -> Ints | None:
    """The tokens that are the tail's special token; None if they are not one for each time it is written."""
    where = np.flatnonzero(ids == tail.ids[0]).astype(np.int32)
    return where if len(where) == text.count(tail.token) else None


def _cuts_plainly(token: dict[str, Any]) -> bool:
    """Whether an added token is found in the text as it is written, and takes nothing of what stands around it."""
    return not (token["lstrip"] or token["rstrip"] or token["single_word"] or token["normalized"])
