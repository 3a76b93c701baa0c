"""Floor 2: what a recipe points at -> conversations -> token ids with the supervised ones marked -> batches."""

from finetune.data.conversations import read_conversations
from finetune.data.tokenizer import load_tokenizer
from finetune.data.tokens import Collator, DataStats, Mixture, Prepared, prepare, prepare_mixture
from finetune.data.types import Conversation, Message

__all__ = [
    "Collator",
    "Conversation",
    "DataStats",
    "Message",
    "Mixture",
    "Prepared",
    "load_tokenizer",
    "prepare",
    "prepare_mixture",
    "read_conversations",
]
