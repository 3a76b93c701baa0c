"""A dense source in one GGUF file: metadata, tensors and tokenizer converted to Hugging Face's.

Only the header is memory-mapped; tensors are read with plain file reads and dequantised a few rows at a time.

transformers' `gguf_file` loader converts the tokenizer's vocabulary, merges and special tokens. What it leaves at a
default is set here as in llama.cpp (llama-vocab.cpp): pre-tokenization, whether a whole word skips the merges, whether
BOS comes first. Without this, 50 of 1,908 texts (of 1,043 with digits) get other ids in SmolLM2 than the model was
trained on.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

from finetune.checkpoint.reader import TORCH_DTYPES
from finetune.errors import Problem, WeightsError
from finetune.files import open_regular
from finetune.model_files import check_values, reading
from finetune.upcycle.dense import EMBEDDING, HEAD, DenseTensor, dense_shapes, write_generation_config
from finetune.upcycle.gguf_header import check_header
from finetune.upstream import private

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
    do = "use the Hugging Face folder of this model"
    with reading(file, "tokenizer cannot be built", do):
        raw = AutoTokenizer.from_pretrained(
            str(file.parent), gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
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
    known = private("transformers.integrations.gguf.gguf_tokenizer_mapping:GGUF_PRE_TOKENIZER_SPLITS")

    do = "use the Hugging Face folder of this model"
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind not in ("llama", "gpt2"):
        raise WeightsError(Problem(f"{file}: tokenizer.ggml.model", "tokenizer is not supported", do, got=str(kind)))
    if kind == "gpt2" and split not in {*known, *GPT2_SPLIT, *DIGIT_SPLIT}:
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


ROWS_ELEMENTS = 2**22  # elements dequantised at once; the numpy code needs about ten bytes of scratch memory each
# Every `llama.*` key that is understood. Any other would silently change the computation, so it is an error.
KNOWN_KEYS = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "attention.key_length",
    "attention.value_length",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "vocab_size",
    "expert_count",
    "expert_used_count",
}


class GgufSource:
    """See `DenseSource`. Tensors are dequantised to `dtype` (as in safetensors), by default BF16."""

    def __init__(self, file: Path, dtype: str | None) -> None:
        self.path = file
        self.metadata, reader = read_metadata(file)
        self.settings = read_settings(file, self.metadata)
        stems = hugging_face_stems(self.settings)
        self._infos = {hugging_face_name(info.name, stems): info for info in reader.tensors}
        self.settings["tie_word_embeddings"] = HEAD not in self._infos
        if EMBEDDING in self._infos:
            self.settings["vocab_size"] = int(self._infos[EMBEDDING].shape[1])
        self.tensors = {
            name: DenseTensor(dtype or "BF16", tuple(int(size) for size in reversed(info.shape)))
            for name, info in self._infos.items()
        }
        for name, info in self._infos.items():
            _check_format(file, name, info)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, dequantised, its rows in Hugging Face's order."""
        from gguf import dequantize

        info, tensor = self._infos[name], self.tensors[name]
        rows, columns = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        row_bytes = info.n_bytes // rows
        weight = torch.empty(rows, columns, dtype=TORCH_DTYPES[tensor.dtype])
        step = max(1, ROWS_ELEMENTS // columns)
        with open_regular(self.path) as stream:
            stream.seek(info.data_offset)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                raw = np.fromfile(stream, dtype=np.uint8, count=count * row_bytes)
                values = dequantize(raw.reshape(count, row_bytes), info.tensor_type)
                weight[start : start + count] = torch.from_numpy(np.array(values, dtype=np.float32))
        heads = self._rotary_heads(name)
        if heads:
            weight = undo_rope_permutation(weight, heads)
        return weight.reshape(tensor.shape)

    def _rotary_heads(self, name: str) -> int | None:
        if name.endswith("self_attn.q_proj.weight"):
            return int(self.settings["num_attention_heads"])
        if name.endswith("self_attn.k_proj.weight"):
            return int(self.settings["num_key_value_heads"])
        return None

    def write_companions(self, folder: Path) -> None:
        """Write the tokenizer of the metadata, and a generation config that also stops at the end of a turn."""
        write_tokenizer(self.path, self.metadata, folder)
        eos, eot = self.settings["eos_token_id"], self.metadata.get("tokenizer.ggml.eot_token_id")
        both = [eos, eot] if eot is not None and eot != eos else eos
        write_generation_config(folder, self.settings, eos=both)


def undo_rope_permutation(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k `[heads * head_dim, H]` from llama.cpp's order (rotated pairs adjacent) to Hugging Face's.

    The inverse of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def hugging_face_stems(settings: dict[str, Any]) -> dict[str, str]:
    """`blk.3.ffn_up` -> `model.layers.3.mlp.up_proj` for every tensor of the model, from llama.cpp's own table."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    table = get_tensor_name_map(MODEL_ARCH.LLAMA, settings["num_hidden_layers"])
    names = [name.removesuffix(".weight") for name in dense_shapes(settings | {"tie_word_embeddings": False})]
    return {table.get_name(name): name for name in names}


def hugging_face_name(name: str, stems: dict[str, str]) -> str:
    """`blk.3.ffn_up.weight` -> `model.layers.3.mlp.up_proj.weight`; an unknown name stays as it is and fails later."""
    stem, dot, kind = name.rpartition(".")
    return f"{stems.get(stem, stem)}{dot}{kind}"


def read_metadata(file: Path) -> tuple[dict[str, Any], Any]:
    """The key-value pairs (the tokenizer's lists as their length) and gguf's reader; no weights are read."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        do = "pip install moe-finetune[gguf]"
        raise WeightsError(Problem(str(file), "reading GGUF needs the gguf package", do)) from error
    check_header(file)
    with reading(file, "is not a readable GGUF file", "fetch it again"):
        reader = GGUFReader(file)
        metadata = {key: _value(key, field) for key, field in reader.fields.items()}
    if reader.byte_order != "I":
        raise WeightsError(Problem(str(file), "has the other byte order", "fetch the little-endian file"))
    if metadata.get("split.count", 0) not in (0, 1):
        do = "join the parts with llama-gguf-split --merge"
        raise WeightsError(Problem(str(file), "is one part of several", do, got=f"{metadata['split.count']} parts"))
    return metadata, reader


def _value(key: str, field: Any) -> Any:
    """A field's content; of the tokenizer's lists (a string for every token) only the length is needed."""
    is_list = field.types[0].name == "ARRAY"
    return len(field.data) if is_list and key.startswith("tokenizer.") else field.contents()


def read_settings(file: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """The MixtralConfig fields that GGUF metadata fix. Raises WeightsError for anything Mixtral cannot express."""
    kind = metadata.get("general.architecture")
    if kind != "llama":
        do = "use a Llama or Mistral model (GGUF calls both llama)"
        raise WeightsError(Problem(str(file), "architecture cannot be upcycled", do, got=str(kind)))
    own = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    if own.get("expert_count"):
        do = "use a dense model"
        got = f"{own['expert_count']} experts"
        raise WeightsError(Problem(str(file), "the source already is a mixture of experts", do, got))
    if unknown := sorted(own.keys() - KNOWN_KEYS):
        do = "use a plain Llama or Mistral model, or the Hugging Face folder of this one"
        raise WeightsError(Problem(str(file), "has settings that are not understood", do, got=", ".join(unknown)))
    if lists := sorted(key for key, value in own.items() if isinstance(value, list)):
        do = "use a model whose layers are alike"
        raise WeightsError(Problem(str(file), "has settings that differ by layer", do, got=", ".join(lists)))
    try:
        settings = _settings(file, own, metadata)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise WeightsError(
            Problem(str(file), "lacks or garbles a setting", "fetch it again", got=str(error))
        ) from error
    check_values(file, settings)
    return settings


def _settings(file: Path, own: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    heads = own["attention.head_count"]
    head_dim = own.get("attention.key_length", own["embedding_length"] // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            do = "use a model whose heads are rotated whole and equal in size"
            got = f"{own[key]} for heads of {head_dim}"
            raise WeightsError(Problem(f"{file}: llama.{key}", "differs from the head size", do, got))
    return {
        "vocab_size": own.get("vocab_size", metadata.get("tokenizer.ggml.tokens")),
        "hidden_size": own["embedding_length"],
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": own["context_length"],
        "rms_norm_eps": _decimal(own["attention.layer_norm_rms_epsilon"]),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "rope_parameters": _rope(file, own),
        "sliding_window": None,
    }


def _rope(file: Path, own: dict[str, Any]) -> dict[str, Any]:
    theta = _decimal(own.get("rope.freq_base", 10000.0))
    kind = own.get("rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": _decimal(own["rope.scaling.factor"])}
    do = "use the Hugging Face folder of this model"
    raise WeightsError(Problem(f"{file}: llama.rope.scaling.type", "cannot be read from GGUF", do, got=str(kind)))


def _decimal(value: float) -> float:
    """The shortest decimal number that is this fp32 value: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _check_format(file: Path, name: str, info: Any) -> None:
    from gguf.quants import _type_traits

    kind = info.tensor_type
    if kind.name not in ("F32", "F16") and kind not in _type_traits:
        do = "use a file in another quantisation"
        raise WeightsError(Problem(f"{file}: {name}", "is in a format that gguf cannot read", do, got=kind.name))
