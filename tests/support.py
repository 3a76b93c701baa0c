"""Tiny real models and tokenizers for the tests: random weights, the published on-disk layout."""

import io
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 384 entries, ChatML template, EOS `<|im_end|>`, a pad token of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(["turn on the kitchen light and set the timer to ten minutes"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def save_tiny_sentencepiece(folder: Path) -> None:
    """A SentencePiece tokenizer of 128 pieces with its `tokenizer.model`: one of the kinds that llama.cpp knows.

    Every piece is text: of tokens that are parts of a character a server does not report each.
    """
    text = [
        "turn on the kitchen light and set the timer to ten minutes",
        "The capital of France is Paris, and the capital of Italy is Rome",
        "List three things that float on water",
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=128,
        minloglevel=2,
    )
    for file in folder.glob("*token*"):
        file.unlink()  # another one
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)


def _dimensions(**overrides: Any) -> dict[str, Any]:
    return {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "sliding_window": None,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        **overrides,
    }


def tiny_mixtral_config(**overrides: Any) -> MixtralConfig:
    """2 layers, hidden 64, intermediate 96, 4 experts, top 2. Weights are wide enough for logits to differ."""
    return MixtralConfig(**_dimensions(**{"num_local_experts": 4, "num_experts_per_tok": 2, **overrides}))


def save_tiny_mixtral(folder: Path, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """A random Mixtral as `save_pretrained` writes it (`block_sparse_moe.experts.N.w1`), with its tokenizer."""
    return _save(MixtralForCausalLM, tiny_mixtral_config(**overrides), folder, dtype, seed)


def save_tiny_mistral(folder: Path, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """A random dense Mistral with its tokenizer."""
    return _save(MistralForCausalLM, MistralConfig(**_dimensions(**overrides)), folder, dtype, seed)


def save_tiny_llama(folder: Path, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """A random dense Llama with its tokenizer."""
    dimensions = _dimensions(**overrides)
    del dimensions["sliding_window"]
    return _save(LlamaForCausalLM, LlamaConfig(**dimensions), folder, dtype, seed)


def _save(model_class: Any, config: Any, folder: Path, dtype: str, seed: int) -> Path:
    torch.manual_seed(seed)
    model = model_class(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
