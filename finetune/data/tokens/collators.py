"""Rows, or pairs of answers in one of four layouts -> one micro-batch of tensors.

B rows or pairs, W tokens of the longest answer, T tokens of the longest row. A pair's documents are its prompt with the
chosen answer and its prompt with the rejected one.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from finetune.data.render import IGNORED
from finetune.data.types import Ints, TokenPair


def needs_one_row(attn_implementation: str) -> bool:
    """Whether the packed rows of a micro-batch must be laid one after the other into one row.

    flash_attention_2 tells documents apart only there, without a mask; for the others the mask would have the square of
    all tokens.
    """
    return attn_implementation == "flash_attention_2"


ROW_PLACES, DOCUMENT_PLACES = 2**40, 2**24
"""How many numbers each row of a data set, and each of its documents, has for its tokens (`places`)."""


class Collator:
    """Makes micro-batches; B rows, T tokens of the longest row. `rows` (list[str]) says where they come from,
    `file:line`, for messages.

    Unpacked: `input_ids`, `labels`, `attention_mask`, each [B, T], padded on the right.
    Packed: `input_ids`, `labels`, `position_ids`, each [B, T], or with `in_one_row` [1, the sum of all lengths].
    There is no `attention_mask`: transformers keeps documents apart by the restarts in `position_ids` only where no
    mask is given, and only without a key/value cache, so the model must be called with `use_cache=False`. Padding on
    the right has position 0 throughout: each token is a document of its own.
    Both: `weight`, as `input_ids`, 1 for a token and 0 for padding; `supervised` [N], the flattened positions of
    `labels[:, 1:]` that are not -100. Without any row: one pad token of weight 0, unpacked, which attention sees.
    Of rows with their `index` in the data set: `places`, as `input_ids`, a number of each token, its own in the set.
    """

    def __init__(self, tokenizer: Any, in_one_row: bool = False) -> None:
        self._padding = {"input_ids": tokenizer.pad_token_id, "labels": IGNORED, "position_ids": 0, "weight": 0}
        self._padding["places"] = 0
        self._empty = {"input_ids": [tokenizer.pad_token_id], "labels": [IGNORED]}
        self._in_one_row = in_one_row

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows that are all packed or all unpacked."""
        rows = features or [self._empty]
        packed = "position_ids" in rows[0]
        keys = ("input_ids", "labels", *(("position_ids",) if packed else ()))
        columns = {key: [torch.tensor(row[key]) for row in rows] for key in keys}
        columns["weight"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
        if "index" in rows[0]:
            columns["places"] = [row["index"] * ROW_PLACES + torch.arange(len(row["input_ids"])) for row in rows]
        if packed and self._in_one_row:
            batch = {key: torch.cat(column).unsqueeze(0) for key, column in columns.items()}
        else:
            batch = {
                key: pad_sequence(column, batch_first=True, padding_value=self._padding[key])
                for key, column in columns.items()
            }
        if not packed:
            batch["attention_mask"] = batch["weight"]
        if not features:
            batch["weight"] = torch.zeros_like(batch["weight"])
        places = [place for row in features for place in (row["row"] if packed else [row["row"]])]
        return {**batch, "supervised": supervised_positions(batch["labels"][:, 1:]), "rows": places}


def supervised_positions(labels: torch.Tensor) -> torch.Tensor:
    """The flattened positions of the labels that are not -100, `[N]`; found on the CPU, before the transfer."""
    return (labels.reshape(-1) != IGNORED).nonzero().squeeze(1)


PairLayout = Literal["padded", "packed", "flat", "shared"]

PROMPT, CHOSEN, REJECTED, PADDING = 0, 1, 2, 3
"""The parts of a pair that a token of a shared row can belong to (`branch`)."""


class _Segment(NamedTuple):
    """Consecutive tokens of a row that belong to one document and branch."""

    ids: Ints
    next_labels: Ints  # label of the token after each, IGNORED where there is none
    position: int  # of the first
    weight: int
    document: int
    branch: int
    place: int = 0  # of the first


class _NumberedPair(NamedTuple):
    """A pair and its index in its table."""

    index: int
    pair: TokenPair

    def first_place(self, branch: int) -> int:
        """Of the first token of the prompt with one answer."""
        return self.index * ROW_PLACES + (branch - CHOSEN) * DOCUMENT_PLACES


class _AnswerPosition(NamedTuple):
    """The position of an answer: `start` is the index in `row` that predicts its first token."""

    row: int
    start: int
    labels: Ints


class _BatchRows(NamedTuple):
    """The rows of a batch, and the positions of the chosen and of the rejected answer of each pair."""

    rows: list[list[_Segment]]
    chosen: list[_AnswerPosition]
    rejected: list[_AnswerPosition]


class PairCollator:
    """Makes micro-batches of pairs; called with features `{"pairs": [indices], "split": name}`.

    Layouts:

    - padded: `input_ids` and `attention_mask` `[2B, T]`, a document a row, the chosen ones first, padded on the right.
    - packed: `input_ids` and `position_ids` `[rows, T]`, a feature a row, the documents of a pair side by side, padded
      on the right. As with `Collator` there is no `attention_mask`: the restarts of `position_ids` keep documents
      apart, and padding has position 0 throughout.
    - flat: as packed, with the rows one after the other in one, `[1, T]`.
    - shared: `input_ids`, `position_ids`, `document` and `branch` `[rows, T]`, a feature a row, padded on the right.
      The prompt of a pair comes once, without its last token; then that token and the chosen answer, then that
      token and the rejected answer, so that every hidden state predicts one token. Positions go on from the prompt
      in both branches (prefix sharing, arXiv 2410.20305). Who sees whom follows from `document` (number of the pair in
      its row; padding has negative ones, each its own) and `branch`.

    In every layout:

    - `shift_labels`, as `input_ids`: the label of the next token of its own document, -100 where there is none.
    - `supervised` `[N]`: the flattened positions of `shift_labels` that are not -100.
    - `weight`, as `input_ids`: how many tokens of the padded layout each stands for: 2 in a shared prompt, 1, and 0 for
      padding. Its sum is the number of tokens in both documents of all pairs, whatever the layout.
    - `answer_index` `[2B, W]`: flattened position that predicts the j-th token of an answer; 0 beyond its end.
    - `completion_mask` `[2B, W]`: 1 where the j-th token is supervised. `answer_length` `[2B]`, in tokens.
    - `ref_chosen_logps`, `ref_rejected_logps` `[B]`, float32, from `reference[split][pair]`, where it was given.
    - of features with their `index`: `places`, as `input_ids`, a number of each token, its own among all pairs and the
      same in every layout. A shared prompt has the numbers of the prompt with the chosen answer.
    - `pairs`: (split, index) of each pair; `rows` (list of str): its `file:line`, for messages.

    Without any feature: no pair, and one pad token of weight 0 that attention sees.

    The pairs of all features are numbered in order; of the `2B`, the chosen answers come first. Padded rows get
    `pad_to_multiple_of` tokens: CUDA's attention copies a mask in every layer whose rows are no multiple of 8.
    """

    def __init__(
        self,
        tokenizer: Any,
        tables: Mapping[str, Sequence[TokenPair]],
        layout: PairLayout,
        reference: Mapping[str, NDArray[np.floating[Any]]] | None = None,
        pad_to_multiple_of: int = 1,
    ) -> None:
        self._pad_token_id: int = tokenizer.pad_token_id
        self._tables, self.reference = tables, reference
        self._pad_to_multiple_of = pad_to_multiple_of
        self.layout = layout

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate the pairs of all features."""
        groups = [
            [_NumberedPair(index, self._tables[feature["split"]][index]) for index in feature["pairs"]]
            for feature in features
        ]
        batch_rows = _LAYOUTS[self.layout](groups) if groups else _no_pairs(self._pad_token_id)
        T = max(sum(len(segment.ids) for segment in row) for row in batch_rows.rows)
        if self.layout in ("padded", "shared"):
            T += -T % self._pad_to_multiple_of
        batch = _tokens(batch_rows.rows, T, self._pad_token_id)
        batch |= _answers([*batch_rows.chosen, *batch_rows.rejected], T)
        batch["supervised"] = supervised_positions(batch["shift_labels"])
        for name in _UNUSED[self.layout] if features and "index" in features[0] else (*_UNUSED[self.layout], "places"):
            del batch[name]
        if self.reference is not None:
            values = [self.reference[feature["split"]][index] for feature in features for index in feature["pairs"]]
            chosen_B, rejected_B = torch.from_numpy(np.asarray(values, dtype=np.float32).reshape(-1, 2)).unbind(1)
            batch |= {"ref_chosen_logps": chosen_B, "ref_rejected_logps": rejected_B}
        named = [(feature["split"], index) for feature in features for index in feature["pairs"]]
        return {**batch, "pairs": named, "rows": [pair.row for _, pair in chain(*groups)]}


def _no_pairs(pad_token_id: int) -> _BatchRows:
    ids, labels = np.array([pad_token_id], np.int32), np.array([IGNORED], np.int32)
    return _BatchRows([[_Segment(ids, labels, position=0, weight=0, document=0, branch=PROMPT)]], [], [])


def _document(numbered: _NumberedPair, document: int, branch: int) -> _Segment:
    """A whole conversation."""
    pair = numbered.pair
    ids, labels = pair.answers[branch - CHOSEN]
    before = np.full(len(pair.prompt_ids) - 1, IGNORED, np.int32)
    all_ids, place = np.concatenate([pair.prompt_ids, ids]), numbered.first_place(branch)
    return _Segment(all_ids, _next(before, labels), 0, 1, document, branch, place)


def _next(*labels: Ints) -> Ints:
    return np.concatenate([*labels, np.array([IGNORED], np.int32)])


def _padded(groups: Sequence[Sequence[_NumberedPair]]) -> _BatchRows:
    rows: list[list[_Segment]] = []
    answers: list[list[_AnswerPosition]] = []
    for branch in (CHOSEN, REJECTED):
        answers.append([])
        for numbered in chain(*groups):
            labels = numbered.pair.answers[branch - CHOSEN][1]
            answers[-1].append(_AnswerPosition(len(rows), len(numbered.pair.prompt_ids) - 1, labels))
            rows.append([_document(numbered, 0, branch)])
    return _BatchRows(rows, *answers)


def _packed(groups: Sequence[Sequence[_NumberedPair]]) -> _BatchRows:
    rows: list[list[_Segment]] = []
    answers: tuple[list[_AnswerPosition], list[_AnswerPosition]] = ([], [])
    for number, group in enumerate(groups):
        row: list[_Segment] = []
        length = 0
        for numbered in group:
            pair = numbered.pair
            for positions, branch, answer in zip(answers, (CHOSEN, REJECTED), pair.answers, strict=True):
                positions.append(_AnswerPosition(number, length + len(pair.prompt_ids) - 1, answer[1]))
                row.append(_document(numbered, len(row), branch))
                length += len(row[-1].ids)
        rows.append(row)
    return _BatchRows(rows, *answers)


def _flat(groups: Sequence[Sequence[_NumberedPair]]) -> _BatchRows:
    return _packed([list(chain(*groups))])


def _shared(groups: Sequence[Sequence[_NumberedPair]]) -> _BatchRows:
    rows: list[list[_Segment]] = []
    answers: tuple[list[_AnswerPosition], list[_AnswerPosition]] = ([], [])
    for number, group in enumerate(groups):
        row: list[_Segment] = []
        length = 0
        for document, numbered in enumerate(group):
            pair, first = numbered.pair, numbered.first_place(CHOSEN)
            prompt, last = pair.prompt_ids[:-1], pair.prompt_ids[-1:]
            row.append(_Segment(prompt, np.full(len(prompt), IGNORED, np.int32), 0, 2, document, PROMPT, first))
            length += len(prompt)
            for positions, branch, (ids, labels) in zip(answers, (CHOSEN, REJECTED), pair.answers, strict=True):
                positions.append(_AnswerPosition(number, length, labels))
                place = numbered.first_place(branch) + len(prompt)
                row.append(
                    _Segment(np.concatenate([last, ids]), _next(labels), len(prompt), 1, document, branch, place)
                )
                length += len(ids) + 1
        rows.append(row)
    return _BatchRows(rows, *answers)


_LAYOUTS: dict[PairLayout, Callable[[Sequence[Sequence[_NumberedPair]]], _BatchRows]] = {
    "padded": _padded,
    "packed": _packed,
    "flat": _flat,
    "shared": _shared,
}
_UNUSED: dict[PairLayout, tuple[str, ...]] = {
    "padded": ("position_ids", "document", "branch"),
    "packed": ("attention_mask", "document", "branch"),
    "flat": ("attention_mask", "document", "branch"),
    "shared": ("attention_mask",),
}


def _tokens(rows: Sequence[Sequence[_Segment]], T: int, pad_token_id: int) -> dict[str, Any]:
    """All columns `[rows, T]`."""
    shape = (len(rows), T)
    columns = {
        "input_ids": np.full(shape, pad_token_id, np.int64),
        "shift_labels": np.full(shape, IGNORED, np.int64),
        "position_ids": np.zeros(shape, np.int64),
        "weight": np.zeros(shape, np.int64),
        "places": np.zeros(shape, np.int64),
        # Padding: documents of one token each, which see themselves alone.
        "document": np.tile(-1 - np.arange(T), (len(rows), 1)),
        "branch": np.full(shape, PADDING, np.int64),
        "attention_mask": np.zeros(shape, np.int64),
    }
    for number, row in enumerate(rows):
        place = 0
        for segment in row:
            here = (number, slice(place, place + len(segment.ids)))
            columns["input_ids"][here] = segment.ids
            columns["shift_labels"][here] = segment.next_labels
            columns["places"][here] = segment.place + np.arange(len(segment.ids))
            columns["position_ids"][here] = segment.position + np.arange(len(segment.ids))
            columns["weight"][here] = segment.weight
            columns["document"][here] = segment.document
            columns["branch"][here] = segment.branch
            columns["attention_mask"][here] = 1
            place += len(segment.ids)
    return {name: torch.from_numpy(column) for name, column in columns.items()}


def _answers(answers: Sequence[_AnswerPosition], T: int) -> dict[str, Any]:
    """Where each answer is predicted, in rows of `T` tokens."""
    W = max((len(answer.labels) for answer in answers), default=1)
    index_BW, mask_BW = (np.zeros((len(answers), W), np.int64) for _ in range(2))
    for number, (row, start, labels) in enumerate(answers):
        index_BW[number, : len(labels)] = row * T + start + np.arange(len(labels))
        mask_BW[number, : len(labels)] = labels != IGNORED
    return {
        "answer_index": torch.from_numpy(index_BW),
        "completion_mask": torch.from_numpy(mask_BW),
        "answer_length": torch.tensor([len(answer.labels) for answer in answers], dtype=torch.int64),
    }
