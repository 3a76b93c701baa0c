"""The settings of a checkpoint's `config.json` that decide its forward, and where two models differ in them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.checkpoint.reader import TORCH_DTYPES, CheckpointReader
from finetune.model_files import load_config

# Everything else decides, or may in some architecture. The sizes of the vocabulary are in the weights' fingerprint.
_NOT_THE_FORWARD = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_internal",
        "_experts_implementation",
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "quantization_config",
        "return_dict",
        "router_aux_loss_coef",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "vocab_size",
    }
)


def forward_settings(folder: Path) -> dict[str, Any]:
    """{setting: value}, as transformers reads them: with its defaults, and old names replaced; `a.b` for nested ones.

    So a key that is left out equals its default, and `rope_theta` of transformers 4 the value in `rope_parameters`.
    """
    config = load_config(folder).to_dict()
    kept = {name: value for name, value in config.items() if name not in _NOT_THE_FORWARD}
    flat: dict[str, Any] = json.loads(json.dumps(_flat(kept), default=str))
    return flat


def differing_settings(recorded: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """`name 2 for 1` of each setting that both have with other values: now, and as it was recorded.

    One that only one of them has comes from another version of transformers.
    """
    shared = sorted((recorded or {}).keys() & now.keys())
    return [f"{name} {now[name]} for {recorded[name]}" for name in shared if recorded and recorded[name] != now[name]]


def announced_dtype(reader: CheckpointReader) -> str | None:
    """The dtype that `config.json` names where no matrix is stored in it; None where it is true or says nothing."""
    named = reader.config.get("dtype") or reader.config.get("torch_dtype")
    stored = {TORCH_DTYPES[reader.info(key).dtype] for key in reader.keys if len(reader.info(key).shape) > 1}
    wrong = isinstance(named, str) and getattr(torch, named, None) not in stored
    return str(named) if wrong else None


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
