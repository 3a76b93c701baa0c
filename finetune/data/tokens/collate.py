"""Rows of a prepared data set -> one micro-batch of tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from finetune.data.render import IGNORED


class Collator:
    """Makes micro-batches; B rows, T tokens of the longest row. `rows` (list[str]) says where they come from,
    `file:line`, for messages.

    Unpacked: `input_ids`, `labels`, `attention_mask`, each [B, T], padded on the right.
    Packed: `input_ids`, `labels`, `position_ids`, each [1, T], the B packed rows one after the other without padding.
    There is no `attention_mask`: transformers keeps documents apart by the restarts in `position_ids` only where no
    mask is given, and only without a key/value cache, so the model must be called with `use_cache=False`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._pad_token_id: int = tokenizer.pad_token_id

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows that are all packed or all unpacked."""
        if "position_ids" in features[0]:
            keys = ("input_ids", "labels", "position_ids")
            batch = {key: torch.tensor([[x for row in features for x in row[key]]]) for key in keys}
            return {**batch, "rows": [where for row in features for where in row["row"]]}
        ids = [torch.tensor(row["input_ids"]) for row in features]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self._pad_token_id),
            "labels": pad_sequence(
                [torch.tensor(row["labels"]) for row in features], batch_first=True, padding_value=IGNORED
            ),
            "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], batch_first=True, padding_value=0),
            "rows": [row["row"] for row in features],
        }
