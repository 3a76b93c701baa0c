"""Floor 2: what a recipe points at -> conversations -> token ids with the supervised ones marked -> batches."""

from finetune.data.conversations import read_conversations
from finetune.data.tokenizer import load_tokenizer
from finetune.data.tokens import (
    Collator,
    DataStats,
    Mixture,
    PairMixture,
    PairTable,
    Prepared,
    TokenPair,
    prepare,
    prepare_mixture,
    prepare_pair_mixture,
)
from finetune.data.types import Conversation, Message

__all__ = [
    "Collator",
    "Conversation",
    "DataStats",
    "Message",
    "Mixture",
    "PairMixture",
    "PairTable",
    "Prepared",
    "TokenPair",
    "load_tokenizer",
    "prepare",
    "prepare_mixture",
    "prepare_pair_mixture",
    "read_conversations",
]
