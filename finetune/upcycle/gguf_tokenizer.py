"""The tokenizer that GGUF metadata describe, written as Hugging Face files.

transformers' `gguf_file` loader converts vocabulary, merges and special tokens. What it leaves at a default is set here
as in llama.cpp (llama-vocab.cpp): pre-tokenization, whether a whole word skips the merges, whether BOS comes first.
Without this, 50 of 1,908 texts (of 1,043 with digits) get other ids in SmolLM2 than the model was trained on.
"""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

from finetune.errors import Problem, WeightsError

SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# `tokenizer.ggml.pre` values that split text as GPT-2 does, and those that split off every digit first.
GPT2_SPLIT = ("gpt-2",)
DIGIT_SPLIT = ("smollm",)
# Those for which llama.cpp skips the merges of a word that is a token, and adds BOS by default.
IGNORE_MERGES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")


def write_tokenizer(file: Path, metadata: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json, its config and the chat template into `folder`, then read them back and check them.

    Raises WeightsError for a type of tokenizer that is not supported.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    _check_supported(file, metadata)
    try:
        raw = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
    except Exception as error:  # what the tokenizers library raises for a vocabulary that contradicts itself
        do = "use the Hugging Face folder of this model"
        raise WeightsError(Problem(str(file), "tokenizer cannot be built", do, got=str(error))) from error
    backend = raw.backend_tokenizer
    _apply_llama_cpp_rules(backend, metadata)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: getattr(raw, name) for name, key in SPECIAL.items() if f"tokenizer.ggml.{key}" in metadata},
        add_bos_token=_adds_bos(metadata),
        add_eos_token=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    tokenizer.save_pretrained(folder)
    _check_written(file, metadata, AutoTokenizer.from_pretrained(folder))


def _check_supported(file: Path, metadata: dict[str, Any]) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    do = "use the Hugging Face folder of this model"
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind not in ("llama", "gpt2"):
        raise WeightsError(Problem(f"{file}: tokenizer.ggml.model", "tokenizer is not supported", do, got=str(kind)))
    if kind == "gpt2" and split not in {*GGUF_PRE_TOKENIZER_SPLITS, *GPT2_SPLIT, *DIGIT_SPLIT}:
        # transformers would split the text as GPT-2 does: other tokens than the model was trained on.
        raise WeightsError(Problem(f"{file}: tokenizer.ggml.pre", "pre-tokenizer is not supported", do, got=str(split)))


def _adds_bos(metadata: dict[str, Any]) -> bool:
    default = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") in IGNORE_MERGES
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def _apply_llama_cpp_rules(backend: Tokenizer, metadata: dict[str, Any]) -> None:
    split = metadata.get("tokenizer.ggml.pre")
    if metadata["tokenizer.ggml.model"] == "llama":
        _use_sentencepiece_rules(backend, bool(metadata.get("tokenizer.ggml.add_space_prefix", True)))
    elif split in DIGIT_SPLIT:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif split in IGNORE_MERGES:
        backend.model.ignore_merges = True


def _use_sentencepiece_rules(backend: Tokenizer, prefix_space: bool) -> None:
    """Merge over the whole text as SentencePiece does, spaces included."""
    space = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), space]) if prefix_space else space
    backend.pre_tokenizer = None
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix_space else steps)


def _check_written(file: Path, metadata: dict[str, Any], tokenizer: Any) -> None:
    """Raise WeightsError unless the written tokenizer has the properties that the metadata state."""
    pairs = {
        name: (metadata.get(f"tokenizer.ggml.{key}"), getattr(tokenizer, f"{name}_id")) for name, key in SPECIAL.items()
    }
    pairs["chat_template"] = (metadata.get("tokenizer.chat_template"), tokenizer.chat_template)
    pairs["vocabulary"] = (metadata["tokenizer.ggml.tokens"], len(tokenizer))
    pairs["adds_bos"] = (
        _adds_bos(metadata),
        tokenizer("a").input_ids[0] == metadata.get("tokenizer.ggml.bos_token_id"),
    )
    do = "use the Hugging Face folder of this model"
    problems = [
        Problem(f"{file}: {name}", "did not survive the conversion of the tokenizer", do, got=repr(written))
        for name, (stated, written) in pairs.items()
        if written != stated
    ]
    if problems:
        raise WeightsError(problems)
