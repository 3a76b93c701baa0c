"""Conversations -> token rows: tokenised in bulk, cut, cached, mixed, packed, made into batches."""

from finetune.data.tokens.collators import Collator
from finetune.data.tokens.prepare import Mixture, Prepared, prepare, prepare_mixture
from finetune.data.tokens.stats import DataStats, RowStats, SetStats
from finetune.data.tokens.token_pairs import (
    PairMixture,
    PairTable,
    prepare_pair_mixture,
)
from finetune.data.tokens.tokenize_rows import RowSet
from finetune.data.types import TokenPair

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
