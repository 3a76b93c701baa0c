"""The marks that a chat template writes around what is said (`<|im_start|>`), and whether the vocabulary has them.

A mark that is no token is split into pieces like any other text: the model has to learn a spelling where a mark was
meant, a user can write it, and an answer that ends with one does not end for any server.
"""

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from finetune.errors import DataError, Problem

# ChatML and its kin, DeepSeek's with wide bars (U+FF5C), Gemma's. Others (`[INST]`, `### Response:`) are text in some
# vocabularies and meant to be.
_MARK = re.compile("<\\|[^<>|\\s]+\\|>|<\uff5c[^<>\uff5c\\s]+\uff5c>|<(?:start|end)_of_\\w+>")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_ANSWER = "answer!"
_PROBE = [{"role": "user", "content": "question?"}, {"role": "assistant", "content": _ANSWER}]


def marks_of(tokenizer: Any) -> list[str]:
    """What looks like a mark in the template's source and in a small conversation that it renders, in their order."""
    if not tokenizer.chat_template:
        return []
    source = _COMMENT.sub("", str(tokenizer.chat_template))
    return list(dict.fromkeys(_MARK.findall(source) + _MARK.findall(_probe(tokenizer))))


def _probe(tokenizer: Any) -> str:
    """A question and an answer as the template writes them; empty where it refuses them: the renderer will say so."""
    try:
        text: str = tokenizer.apply_chat_template(_PROBE, tokenize=False)
    except (TemplateError, TypeError, ValueError):
        return ""
    return text


def refuse_split_marks(tokenizer: Any, name: str, added: Sequence[str]) -> None:
    """Raise DataError where the template that the recipe names writes marks which are not single tokens.

    A checkpoint's own template is left alone: some checkpoints were trained on marks in pieces (Zephyr).
    `added`: tokens that the recipe has already added.
    """
    lengths = {mark: len(tokenizer.encode(mark, add_special_tokens=False)) for mark in marks_of(tokenizer)}
    split = [mark for mark, length in lengths.items() if length > 1]
    if not split:
        return
    end = _mark_after_answer(tokenizer)
    lines = f"model.added_tokens: [{', '.join(map(_quoted, [*added, *split]))}]"
    if end is not None and end != tokenizer.eos_token:
        lines += f" and model.eos_token: {_quoted(end)}"
    raise DataError(
        Problem(
            where="data.chat_template",
            what=f"{name} writes marks that this vocabulary lacks, and that would be split into pieces",
            got=", ".join(f"{mark} in {lengths[mark]} pieces" for mark in split),
            do=f"write {lines}, or name another template",
        )
    )


def refuse_unended_answers(tokenizer: Any) -> None:
    """Raise DataError where an answer ends with a special token that is not the tokenizer's EOS."""
    end = _mark_after_answer(tokenizer)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    if end is not None and end != tokenizer.eos_token and end in special:
        raise DataError(
            Problem(
                where="model.eos_token",
                what=f"the chat template ends an answer with {end}, so the model would never learn to stop",
                got=str(tokenizer.eos_token),
                do=f"write model.eos_token: {_quoted(end)}, or name another template in data.chat_template",
            )
        )


def _mark_after_answer(tokenizer: Any) -> str | None:
    after = _probe(tokenizer).rpartition(_ANSWER)[2]
    match = _MARK.match(after.lstrip())
    return match[0] if match else None


def _quoted(token: str) -> str:
    return '"' + token + '"'
