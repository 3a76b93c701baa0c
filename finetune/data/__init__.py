"""Floor 2: rows of a JSONL file -> conversations -> token ids with the supervised ones marked -> batches."""

from finetune.data.collate import Collator
from finetune.data.conversations import read_conversations
from finetune.data.prepare import DataStats, Prepared, prepare
from finetune.data.tokenizer import load_tokenizer
from finetune.data.types import Conversation, Message

__all__ = [
    "Collator",
    "Conversation",
    "DataStats",
    "Message",
    "Prepared",
    "load_tokenizer",
    "prepare",
    "read_conversations",
]
