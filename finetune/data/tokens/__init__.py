"""Conversations -> token rows: tokenised in bulk, cut, cached, mixed, packed, made into batches."""

from finetune.data.tokens.collate import Collator
from finetune.data.tokens.pairs import (
    PairMixture,
    PairTable,
    TokenPair,
    prepare_pair_mixture,
)
from finetune.data.tokens.prepare import Mixture, Prepared, prepare, prepare_mixture
from finetune.data.tokens.rows import RowSet
from finetune.data.tokens.stats import DataStats, RowStats, SetStats

__all__ = [
    "Collator",
    "DataStats",
    "Mixture",
    "PairMixture",
    "PairTable",
    "Prepared",
    "RowSet",
    "RowStats",
    "SetStats",
    "TokenPair",
    "prepare",
    "prepare_mixture",
    "prepare_pair_mixture",
]
