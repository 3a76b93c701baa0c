"""Templates with `{% generation %}` marks: what the marks supervise and generation need not produce."""

import re

import pytest

from tests.rendering import chat
from tests.templates import family_tokenizer, marked, trained, trl_template, trl_templates

ONE = chat("One?", "It is one.")
# Template -> its tokens, and the text that its marks have before and behind what the model must write itself. None:
# the finished text has another beginning of the answer than generation, which comes from a prompt with an open block.
MARKED: dict[str, tuple[str, tuple[str, str] | None]] = {
    "cohere2_training": ("cohere", ("", "")),
    "cohere_training": ("cohere", ("", "")),
    "deepseek_r1_distill_training": ("deepseek", None),
    "deepseekv3_training": ("deepseek", None),
    "diffusion_gemma_training": ("gemma4", ("", "\n")),
    "gemma3_training": ("gemma", ("", "\n")),
    "gemma_training": ("gemma", ("", "\n")),
    "glm4moe_training": ("glm", ("", "")),
    "gptoss_training": ("gptoss", ("<|start|>assistant", "")),
    "lfm2_2_5": ("lfm2", ("", "\n")),
    "lfm2_2_5_v2": ("lfm2", ("", "\n")),
    "lfm2_2_5_vl": ("lfm2", ("", "\n")),
    "lfm2_training": ("lfm2", ("", "\n")),
    "lfm2_v2_training": ("lfm2", ("", "\n")),
    "llama3_training": ("llama3", ("", "")),
    "muse_glimmer_training": ("muse", ("<|start|>assistant", "")),
    "nemotron_3_5_lightning_training": ("nemotron", ("<think>", "\n")),
    "nemotron_3_nano_training": ("nemotron", None),
    "nemotron_3_super_training": ("nemotron", None),
    "nemotron_3_ultra_training": ("nemotron", ("<think>", "\n")),
    "phi3_5_training": ("phi", ("", "\n<|endoftext|>")),
    "phi3_training": ("phi", ("", "\n<|endoftext|>")),
    "qwen2_5_training": ("qwen", ("\n", "\n")),
    "qwen2_5_vl_training": ("qwen", ("", "\n")),
    "qwen3_5_nothink_training": ("qwen", ("<think>\n\n</think>\n\n", "\n")),
    "qwen3_5_think_training": ("qwen", ("<think>\n", "\n")),
    "qwen3_6_training": ("qwen", ("<think>\n", "\n")),
    "qwen3_8_training": ("qwen", ("<think>\n", "\n")),
    "qwen3_instruct_2507_training": ("qwen", ("", "\n")),
    "qwen3_training": ("qwen", ("", "\n")),
    "qwen3_vl_training": ("qwen", ("", "\n")),
}
IMAGES_ONLY = {"idefics3_training", "llava_next_training", "smolvlm_training"}


def test_every_template_with_marks_is_in_the_table() -> None:
    found = {name for name in trl_templates() if re.search(r"\{%-?\s*generation", trl_template(name))}
    assert found == MARKED.keys() | IMAGES_ONLY


@pytest.mark.parametrize("name", MARKED)
def test_marks_supervise_the_answer_and_more(name: str) -> None:
    """The mask of `return_assistant_tokens_mask` against what generation must produce."""
    tokens, more = MARKED[name]
    tokenizer = family_tokenizer(tokens, trl_template(name))
    [text] = trained(tokenizer, ONE)
    ours = text[text.index("«") + 1 : text.index("»")]
    encoded = tokenizer.apply_chat_template(ONE.messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    labels = [token if supervised else -100 for token, supervised in zip(ids, mask, strict=True)]
    [theirs] = [piece[1:] for piece in marked(tokenizer, ids, labels) if piece.startswith("*")]
    if more is None:
        assert ours not in theirs
    else:
        assert theirs == more[0] + ours + more[1]
