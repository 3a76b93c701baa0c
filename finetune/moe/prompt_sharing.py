"""Which models can run a prompt once for two answers."""

from dataclasses import fields
from typing import Any

from finetune.moe.layout import Family

MASKED_ATTENTION = ("sdpa", "eager")
"""Attention code that takes a mask of who sees whom."""


def prompt_sharing_refusal(family: Family, config: Any, attn_implementation: str, max_length: int) -> str | None:
    """Why a prompt cannot be shared by two answers with the results of each alone; None where it can.

    `config`: transformers' own, with its defaults. `max_length`: tokens of the longest prompt with one answer.
    """
    if family.unpackable:
        return family.unpackable
    if attn_implementation not in MASKED_ATTENTION:
        return f"{attn_implementation} takes no mask of who sees whom (use {' or '.join(MASKED_ATTENTION)})"
    reach = _reach(config)
    if reach is not None and reach < max_length:
        return (
            f"some of its layers look back {reach} tokens only, which the mask of shared prompts does not say, and a "
            f"row may have {max_length}"
        )
    return None


def _reach(config: Any) -> int | None:
    """Tokens up to which every layer sees all that came before; None where there is no end.

    Layers see by the positions in a document, so that a longer row of several pairs changes nothing.
    """
    # What a config.json says beyond the architecture's own settings is kept, and read by nobody.
    declared = {field.name: getattr(config, field.name) for field in fields(config)}
    kinds = declared.get("layer_types")
    reaches = {
        "sliding_attention": declared.get("sliding_window"),
        "chunked_attention": declared.get("attention_chunk_size"),
    }
    # Without types of layers one window is for all of them.
    found = [reach for kind, reach in reaches.items() if reach is not None and (kinds is None or kind in kinds)]
    return min(found, default=None)
