"""A dense source in a Hugging Face folder: config.json, safetensors, tokenizer files."""

import shutil
from pathlib import Path
from typing import Any

import torch

from finetune.checkpoint import CheckpointReader, verify_sums
from finetune.checkpoint.reader import TORCH_DTYPES
from finetune.errors import Problem, WeightsError
from finetune.model_files import build_config
from finetune.upcycle.dense import ARCHITECTURES, EMBEDDING, HEAD, DenseTensor, write_generation_config

FLOATS = ("F32", "F16", "BF16")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
COMPANIONS = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)
# Rope types that MixtralRotaryEmbedding computes with the same code as Llama's and Mistral's.
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
MOE_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CARRIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
    "rope_parameters",
)


class HuggingFaceSource:
    """See `DenseSource`. `dtype` (as in safetensors) converts every tensor; None keeps each tensor's own."""

    def __init__(self, folder: Path, dtype: str | None) -> None:
        verify_sums(folder)
        self.path = folder
        self._reader = CheckpointReader(folder)
        self.settings = read_settings(folder, self._reader.config)
        self.tensors = {
            key: DenseTensor(dtype or self._reader.info(key).dtype, self._reader.info(key).shape)
            for key in self._reader.keys
            # Written by transformers before 4.32: a buffer computed from the config.
            if not key.endswith(".rotary_emb.inv_freq")
        }
        self._check_dtypes()
        self._drop_tied_head()
        if not any((folder / name).is_file() for name in TOKENIZERS):
            do = "put the model's tokenizer files into the folder"
            raise WeightsError(Problem(str(folder), "holds no tokenizer", do, got="none of " + ", ".join(TOKENIZERS)))

    def _check_dtypes(self) -> None:
        for key in self.tensors:
            dtype = self._reader.info(key).dtype
            if dtype not in FLOATS:
                do = "use the unquantised checkpoint (float32, bfloat16 or float16)"
                raise WeightsError(Problem(f"{self.path}: {key}", "is quantised or not a 16/32-bit float", do, dtype))

    def _drop_tied_head(self) -> None:
        """Drop the head of a tied model if it is stored as well; it must equal the embedding."""
        if not self.settings["tie_word_embeddings"] or HEAD not in self.tensors or EMBEDDING not in self.tensors:
            return
        if not torch.equal(self._reader.read(HEAD), self._reader.read(EMBEDDING)):
            do = f'set "tie_word_embeddings": false in config.json, or remove {HEAD}'
            raise WeightsError(Problem(f"{self.path}: {HEAD}", "differs from the embedding it is tied to", do))
        del self.tensors[HEAD]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, converted if a dtype was asked for."""
        return self._reader.read(name).to(TORCH_DTYPES[self.tensors[name].dtype])

    def write_companions(self, folder: Path) -> None:
        """Copy tokenizer and template files as they are; the generation config too, or make it from config.json."""
        for name in COMPANIONS:
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, folder / name)
            elif (self.path / name).is_dir():
                shutil.copytree(self.path / name, folder / name)
        generation = self.path / "generation_config.json"
        if generation.is_file():
            shutil.copyfile(generation, folder / generation.name)
        else:
            write_generation_config(folder, self.settings)


def read_settings(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """The MixtralConfig fields that a dense config.json fixes. Raises WeightsError for what Mixtral cannot express."""
    where = str(folder / "config.json")
    _check_architecture(where, raw)
    config = build_config(raw, folder)
    _check_settings(where, config)
    settings = {name: getattr(config, name) for name in CARRIED}
    settings["head_dim"] = config.head_dim or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    # A window of at least the context length masks nothing.
    settings["sliding_window"] = window if window is not None and window < config.max_position_embeddings else None
    return settings


def _check_architecture(where: str, raw: dict[str, Any]) -> None:
    do = "use a dense Llama or Mistral model (LlamaForCausalLM, MistralForCausalLM)"
    kind = raw.get("model_type")
    if any(raw.get(field) for field in MOE_FIELDS):
        raise WeightsError(Problem(where, "the source already is a mixture of experts", do, got=str(kind)))
    if kind not in ("llama", "mistral"):
        raise WeightsError(Problem(where, "architecture cannot be upcycled", do, got=str(kind)))
    named = raw.get("architectures") or []
    for name in named if isinstance(named, list) else [named]:
        if name not in ARCHITECTURES:
            raise WeightsError(Problem(where, "architecture cannot be upcycled", do, got=str(name)))
    if raw.get("quantization_config"):
        do = "use the unquantised checkpoint"
        found = raw["quantization_config"]
        got = str(found.get("quant_method") if isinstance(found, dict) else found)
        raise WeightsError(Problem(where, "the source is quantised", do, got))


def _check_settings(where: str, config: Any) -> None:
    do = "use a model without it: Mixtral cannot express it"
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise WeightsError(Problem(f"{where}: {name}", "is on", do, got="true"))
    rope = config.rope_parameters
    if rope["rope_type"] not in ROPE_TYPES:
        do = f"use a model with one of: {', '.join(ROPE_TYPES)}"
        raise WeightsError(Problem(f"{where}: rope_type", "is not one Mixtral can express", do, got=rope["rope_type"]))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        got = str(rope["partial_rotary_factor"])
        raise WeightsError(Problem(f"{where}: partial_rotary_factor", "rotates a part of each head only", do, got))
