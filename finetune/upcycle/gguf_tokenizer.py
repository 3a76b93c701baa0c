"""The tokenizer that GGUF metadata describe, written as Hugging Face files.

transformers reads vocabulary, merges and special tokens; what it leaves to defaults is set here as llama.cpp has it
(llama-vocab.cpp): how text is cut before merging, whether a whole word skips the merges, whether BOS comes first.
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
# `tokenizer.ggml.pre` values whose cut is GPT-2's, and those that cut every digit off first.
GPT2_CUT = ("gpt-2",)
DIGIT_CUT = ("smollm",)
# Those for which llama.cpp takes a word that is a token whole, and puts BOS first unless told otherwise.
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")


def write_tokenizer(file: Path, metadata: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json, its config and the chat template into `folder`; then read them back and compare.

    Raises WeightsError for a kind of tokenizer whose exact behaviour is not known here.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    _refuse_unknown(file, metadata)
    try:
        raw = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
    except Exception as error:  # what the tokenizers library raises for a vocabulary that contradicts itself
        do = "use the Hugging Face folder of this model"
        raise WeightsError(Problem(str(file), "tokenizer cannot be built", do, got=str(error))) from error
    backend = raw.backend_tokenizer
    _complete(backend, metadata)
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
    _compare(file, metadata, AutoTokenizer.from_pretrained(folder))


def _refuse_unknown(file: Path, metadata: dict[str, Any]) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    do = "use the Hugging Face folder of this model"
    kind, cut = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind not in ("llama", "gpt2"):
        raise WeightsError(Problem(f"{file}: tokenizer.ggml.model", "tokenizer is not supported", do, got=str(kind)))
    if kind == "gpt2" and cut not in {*GGUF_PRE_TOKENIZER_SPLITS, *GPT2_CUT, *DIGIT_CUT}:
        # transformers would cut the text as GPT-2 does: other tokens than the model was trained on.
        raise WeightsError(Problem(f"{file}: tokenizer.ggml.pre", "pre-tokenizer is not supported", do, got=str(cut)))


def _adds_bos(metadata: dict[str, Any]) -> bool:
    default = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") in WHOLE_WORDS
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def _complete(backend: Tokenizer, metadata: dict[str, Any]) -> None:
    cut = metadata.get("tokenizer.ggml.pre")
    if metadata["tokenizer.ggml.model"] == "llama":
        _as_sentencepiece(backend, bool(metadata.get("tokenizer.ggml.add_space_prefix", True)))
    elif cut in DIGIT_CUT:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif cut in WHOLE_WORDS:
        backend.model.ignore_merges = True


def _as_sentencepiece(backend: Tokenizer, prefix_space: bool) -> None:
    """Merge over the whole text as SentencePiece does, spaces included."""
    space = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), space]) if prefix_space else space
    backend.pre_tokenizer = None
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix_space else steps)


def _compare(file: Path, metadata: dict[str, Any], tokenizer: Any) -> None:
    """What was written must say what the metadata say."""
    wanted: dict[str, Any] = {"chat_template": metadata.get("tokenizer.chat_template")}
    found: dict[str, Any] = {"chat_template": tokenizer.chat_template}
    for name, key in SPECIAL.items():
        wanted[name] = metadata.get(f"tokenizer.ggml.{key}")
        found[name] = getattr(tokenizer, f"{name}_id")
    wanted["vocabulary"], found["vocabulary"] = metadata["tokenizer.ggml.tokens"], len(tokenizer)
    ids = tokenizer("a").input_ids
    wanted["adds_bos"], found["adds_bos"] = _adds_bos(metadata), ids[0] == wanted["bos_token"]
    do = "use the Hugging Face folder of this model"
    problems = [
        Problem(f"{file}: {name}", "did not survive the conversion of the tokenizer", do, got=repr(found[name]))
        for name in wanted
        if wanted[name] != found[name]
    ]
    if problems:
        raise WeightsError(problems)
