"""From the data sources of a recipe to batches: rows -> conversations -> token ids and labels -> tensors."""

from finetune.data.conversations import read_conversations
from finetune.data.render import set_template_args, set_template_day, template_args, template_day
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
    "set_template_args",
    "set_template_day",
    "template_args",
    "template_day",
]
