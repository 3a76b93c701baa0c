"""Whether a model can run a prompt once for two answers."""

from dataclasses import fields
from typing import Any

from finetune.moe.layout import Family

MASKED_ATTENTION = ("sdpa", "eager")
"""Attention implementations that accept an explicit mask."""


def prompt_sharing_refusal(family: Family, config: Any, attn_implementation: str, max_length: int) -> str | None:
    """Why sharing a prompt between two answers would change their results; None if it does not.

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
    """The shortest attention window of all layers in tokens; None without a window.

    Windows count positions within a document, so a longer row of several pairs changes nothing.
    """
    # transformers keeps unknown fields of a config.json without using them.
    declared = {field.name: getattr(config, field.name) for field in fields(config)}
    kinds = declared.get("layer_types")
    reaches = {
        "sliding_attention": declared.get("sliding_window"),
        "chunked_attention": declared.get("attention_chunk_size"),
    }
    # Without layer types one window applies to all layers.
    windows = [reach for kind, reach in reaches.items() if reach is not None and (kinds is None or kind in kinds)]
    return min(windows, default=None)
