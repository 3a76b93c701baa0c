"""Published templates with the merges of real tokenizers, where line breaks and the words around them are one token."""

import copy
import functools
import json
from typing import Any

import pytest
from tokenizers import AddedToken

from finetune.data.render import Renderer, set_stop_tokens
from tests.real_tokenizers import mistral_tokenizer
from tests.rendering import chat
from tests.template_oracle import Oracle, check_examples
from tests.templates import TOKENS, trained, trl_template, with_tokens_of
from tests.unit.template_cases import CONVERSATIONS, TEMPLATES

# Their prompts end with a line break, their answers begin with one, or with a space.
NAMES = ("deepseekv3", "glm4moe", "muse_glimmer", "nemotron_3_nano", "qwen3_5_think")


@pytest.mark.parametrize("name", NAMES)
def test_masks_with_the_merges_of_tekken(name: str) -> None:
    """130,000 merges of Mistral's tokenizer, which cuts words as those of these families do."""
    template = TEMPLATES[name]
    tokenizer = with_tokens_of(template.tokens, _tekken())
    tokenizer.chat_template = trl_template(name)
    set_stop_tokens(tokenizer, TOKENS[template.tokens].stops)
    assert len(tokenizer.tokenize("\n\n")) == 1
    renderer, refused = Renderer(tokenizer, "its template"), template.uses[0].refused
    for conversation, given in CONVERSATIONS.items():
        if not {conversation, f"{conversation}/assistant"} & refused.keys():
            check_examples(renderer, given, "assistant", Oracle(tokenizer, template.family, {}, given))


def test_phi_with_marks_that_take_the_line_break() -> None:
    """Phi-3.5's tokenizer is Llama 2's, and its marks are read with the white space behind them."""
    tokenizer = copy.deepcopy(mistral_tokenizer("v1"))
    marks = [AddedToken(mark, special=True, normalized=False, rstrip=True) for mark in TOKENS["phi"].special.split()]
    tokenizer.add_tokens([AddedToken("<|endoftext|>", special=True, normalized=False), *marks])
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = trl_template("phi3_5")
    assert trained(tokenizer, chat("One?", "It is one.", "Two?", "It is two.\nYes.")) == [
        "<|user|>One?<|end|><|assistant|>«It is one.<|end|>»<|user|>Two?<|end|><|assistant|>«It is two.\nYes.<|end|>»"
        "<|endoftext|>"
    ]


@functools.cache
def _tekken() -> str:
    """Its JSON without special tokens."""
    state: dict[str, Any] = json.loads(mistral_tokenizer("tekken").backend_tokenizer.to_str())
    return json.dumps({**state, "added_tokens": [], "post_processor": None})
