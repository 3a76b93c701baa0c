"""Duplicates between training set and evaluation set, exact or near.

The texts of user, assistant and tools are compared, without the template and the system prompt, which all rows share
and which would make short rows similar. The similarity of two rows is the Jaccard index of their word triples, over all
triples or over those that few evaluation rows have, whichever is lower: so neither a long instruction before each
question nor a rare name in two different questions makes a pair. On commands of ten words (data/quickstart), on gsm8k
and on alpaca a threshold of 0.8 finds copies only; the most similar rows that are not copies have 0.71, 0.19 and 0.11.
(Shingles of five characters do not tell "to 23 degrees" from "to 25 degrees".)

MinHash (`rensa`) only proposes pairs; the similarity of each is then computed exactly. The triples of the evaluation
rows are kept in memory, eight bytes each; training rows are streamed.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice

import numpy as np
import numpy.typing as npt
from rensa import RMinHash, RMinHashLSH

from finetune.data.types import Conversation, Document, Judged, Message, Preference, RowContent

NEAR = 0.8
"""Similarity from which two rows are near duplicates."""
LISTED = 20
"""Number of pairs that are listed, the most similar first; the rest is counted."""

_FEW, _FEW_SHARE = 10, 0.05  # a triple in more evaluation rows than both is frequent
_SLOTS, _BANDS, _SEED = 128, 32, 0  # bands of 4: a pair at 0.8 is missed with probability 1e-7
_CHUNK_ROWS = 256
# In scripts without spaces between words each character counts as a word: Thai to Tibetan, Burmese, Khmer, Chinese,
# Japanese.
_UNSPACED = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")

Hashes = npt.NDArray[np.uint64]
Texts = Iterable[tuple[str, str]]
"""Texts of rows, each with its `file:line` before it."""


@dataclass(frozen=True)
class Pair:
    """A training row and an evaluation row (`file:line`); `exact`: the same up to case and white space."""

    train: str
    eval: str
    similarity: float
    exact: bool

    def __str__(self) -> str:
        return f"{self.train} ~ {self.eval} ({'exact' if self.exact else f'{self.similarity:.2f}'})"


@dataclass(frozen=True)
class Duplicates:
    """Of `eval_rows` evaluation rows, `exact` equal a training row and `near` others have a near duplicate.

    `train_rows`: training rows in such a pair. `pairs`: the evaluation rows, each with its most similar training row.
    """

    eval_rows: int
    exact: int
    near: int
    train_rows: int
    pairs: list[Pair]


def words_of(example: RowContent) -> str:
    """What a row says: all turns but the system's, one a line, or the document. A pair's prompt is said once.

    Reasoning is left out: distilled sets have several for one question and answer, and its length would hide these.
    """
    if isinstance(example, Document):
        return example.text
    texts = []
    for message in _messages(example):
        if message["role"] != "system":
            calls = [call["function"] for call in message.get("tool_calls", [])]
            texts += [message["content"], *(json.dumps(call, ensure_ascii=False) for call in calls)]
    return "\n".join(texts)


def _messages(example: Conversation | Preference | Judged) -> list[Message]:
    if isinstance(example, Conversation):
        return example.messages
    if isinstance(example, Preference):
        return [*example.prompt, *example.chosen, *example.rejected]
    return [*example.prompt, *example.completion]


def find_duplicates(train: Texts, evaluation: Texts) -> Duplicates:
    """Compare the texts of training rows and evaluation rows."""
    index = _Index(evaluation)
    return index.duplicates(sum(map(index.compare, _chunks(train))))


def _chunks(rows: Texts) -> Iterator[list[tuple[str, str]]]:
    rows = iter(rows)
    while chunk := list(islice(rows, _CHUNK_ROWS)):
        yield chunk


class _Index:
    """The evaluation rows, each with the most similar training row so far."""

    def __init__(self, rows: Texts) -> None:
        self.places: list[str] = []
        self._triples: list[Hashes] = []
        self._by_text: dict[bytes, list[int]] = {}
        self._nearest: dict[int, Pair] = {}
        for chunk in _chunks(rows):
            self._triples += _triples([text for _, text in chunk])
            for where, text in chunk:
                self._by_text.setdefault(_text_key(text), []).append(len(self.places))
                self.places.append(where)
        self._frequent = _frequent(self._triples)
        self._rare = [len(self._rare_of(triples)) for triples in self._triples]
        self._buckets = RMinHashLSH(NEAR, _SLOTS, _BANDS)
        for start in range(0, len(self.places), _CHUNK_ROWS):
            self._buckets.insert_many(self._sketches(self._triples[start : start + _CHUNK_ROWS]), start)

    def compare(self, rows: Sequence[tuple[str, str]]) -> int:
        """Compare training rows with the evaluation rows; returns how many have a duplicate there."""
        triples = _triples([text for _, text in rows])
        count = 0
        for (where, text), own, candidates in zip(
            rows, triples, self._buckets.query_all(self._sketches(triples)), strict=True
        ):
            same = self._by_text.get(_text_key(text), [])
            for index in same:
                self._keep_nearest(index, where, 1.0, exact=True)
            near = [(index, self._similarity(own, index)) for index in set(candidates).difference(same)]
            near = [(index, similarity) for index, similarity in near if similarity >= NEAR]
            for index, similarity in near:
                self._keep_nearest(index, where, similarity, exact=False)
            count += bool(same or near)
        return count

    def _similarity(self, own: Hashes, index: int) -> float:
        common = np.intersect1d(own, self._triples[index], assume_unique=True)
        rare = len(self._rare_of(common))
        of_all = len(own) + len(self._triples[index]) - len(common)
        of_rare = len(self._rare_of(own)) + self._rare[index] - rare
        return min(len(common) / of_all, rare / of_rare) if of_rare else 0.0

    def _rare_of(self, triples: Hashes) -> Hashes:
        if not len(self._frequent):
            return triples
        at = np.searchsorted(self._frequent, triples).clip(max=len(self._frequent) - 1)
        rare: Hashes = triples[self._frequent[at] != triples]
        return rare

    def _sketches(self, rows: list[Hashes]) -> list[RMinHash]:
        """MinHashes of the rare triples of the rows. A row without any gets a token of its own."""
        sets = []
        for number, triples in enumerate(rows):
            raw = self._rare_of(triples).tobytes()
            sets.append([raw[i : i + 8] for i in range(0, len(raw), 8)] or [b"none of row %d" % number])
        sketches: list[RMinHash] = RMinHash.from_token_sets(sets, _SLOTS, _SEED)
        return sketches

    def _keep_nearest(self, index: int, train: str, similarity: float, exact: bool) -> None:
        known = self._nearest.get(index)
        if known is None or (exact, similarity) > (known.exact, known.similarity):
            self._nearest[index] = Pair(train, self.places[index], similarity, exact)

    def duplicates(self, train_rows: int) -> Duplicates:
        """The result; `train_rows`: number of training rows with a duplicate."""
        pairs = [self._nearest[index] for index in sorted(self._nearest)]
        exact = sum(pair.exact for pair in pairs)
        nearest_first = sorted(pairs, key=lambda pair: (not pair.exact, -pair.similarity))
        return Duplicates(len(self.places), exact, len(pairs) - exact, train_rows, nearest_first[:LISTED])


def _triples(texts: Sequence[str]) -> list[Hashes]:
    """Hashes of the word triples of each text, in lower case and without punctuation; ascending, each once."""
    words = RMinHash.hash_token_sets([_WORD.findall(text.casefold()) for text in texts])
    return [_combined(np.array(row, dtype=np.uint64)) for row in words]


_ODD = np.uint64(0x9E3779B97F4A7C15)


def _combined(words: Hashes) -> Hashes:
    # Products wrap around, as they do in any such hash.
    triples = (words[:-2] * _ODD ^ words[1:-1]) * _ODD ^ words[2:]
    return np.unique(triples * _ODD ^ (triples >> np.uint64(29)))


def _frequent(rows: list[Hashes]) -> Hashes:
    """The triples of too many rows, ascending."""
    if not rows:
        return np.empty(0, dtype=np.uint64)
    values, counts = np.unique(np.concatenate(rows), return_counts=True)
    return values[counts > max(_FEW, _FEW_SHARE * len(rows))]


def _text_key(text: str) -> bytes:
    plain = " ".join(text.casefold().split())
    return blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=16).digest()
