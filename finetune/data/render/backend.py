"""A Rust tokenizer taken apart without its JSON: a large vocabulary would take a second to write, read and parse."""

import json
from typing import Any

from tokenizers import Tokenizer

_STEPS = ("normalizer", "pre_tokenizer")
_MODEL = ("dropout", "unk_token", "byte_fallback", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
_ADDED = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def bare_copy(backend: Tokenizer) -> Tokenizer:
    """A tokenizer with the same vocabulary (shared) and settings of its own: no padding, truncation or special tokens.

    What is set on `backend` afterwards does not reach it.
    """
    copy = Tokenizer(backend.model)
    for step in (*_STEPS, "decoder"):
        if getattr(backend, step) is not None:
            setattr(copy, step, getattr(backend, step))
    added = backend.get_added_tokens_decoder()
    # As reading the JSON does: in the order of their numbers each gets the number it had.
    copy.add_tokens([added[number] for number in sorted(added)])
    return copy


def state_of(backend: Tokenizer) -> dict[str, Any]:
    """Of the JSON of a tokenizer what decides how text becomes tokens, the merges themselves excepted."""
    steps = {step: getattr(backend, step) for step in _STEPS}
    model, added = backend.model, backend.get_added_tokens_decoder()
    return {
        **{name: None if step is None else json.loads(step.__getstate__()) for name, step in steps.items()},
        "model": {
            "type": type(model).__name__,
            "vocab": backend.get_vocab(with_added_tokens=False),
            **{name: getattr(model, name, None) for name in _MODEL},
        },
        "added_tokens": [
            {"id": number, **{name: getattr(added[number], name) for name in _ADDED}} for number in sorted(added)
        ],
    }
