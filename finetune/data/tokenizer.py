"""Load and check a tokenizer: it must be fast, have an EOS, and one token for each special token of the template. Only
tokens that the recipe names are added.

A special token (`<|im_start|>`) that the vocabulary lacks is split into pieces like other text: the model has to learn
its spelling, a user can type it, and no server stops at it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from finetune.data.render.chat_template import ChatTemplate
from finetune.data.render.compiled_template import SHIPPED, read_template
from finetune.data.render.template_checks import problems_of_template
from finetune.data.render.template_settings import set_stop_tokens, set_template_args, stop_tokens
from finetune.data.row_errors import RowError
from finetune.data.types import Message
from finetune.errors import DataError, Problem, RecipeError, WeightsError
from finetune.generation_config import stop_ids
from finetune.model_files import read_tokenizer, reading

# ChatML and similar formats, DeepSeek's with wide bars (U+FF5C), Gemma's. Others (`[INST]`, `### Response:`) are text
# in some vocabularies and meant to be.
_SPECIAL_TOKEN = re.compile("<\\|[^<>|\\s]+\\|>|<\uff5c[^<>\uff5c\\s]+\uff5c>|<(?:start|end)_of_\\w+>")
_MISTRAL_TOKEN = re.compile(r"\[/?[A-Z_]+\]")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_ANSWER = "answer!"
_PROBE = [Message(role="user", content="question?"), Message(role="assistant", content=_ANSWER)]


def template_tokens(tokenizer: Any) -> list[str]:
    """The special tokens in the template's source and in a small conversation that it renders, in their order."""
    if not tokenizer.chat_template:
        return []
    source = _COMMENT.sub("", str(tokenizer.chat_template))
    return list(dict.fromkeys(_SPECIAL_TOKEN.findall(source) + _SPECIAL_TOKEN.findall(_probe(tokenizer))))


def _probe(tokenizer: Any) -> str:
    """A question and an answer as the template writes them; empty where it rejects them, which the renderer reports."""
    try:
        return ChatTemplate(tokenizer, "the chat template").text(_PROBE)
    except RowError:
        return ""


def check_split_tokens(tokenizer: Any, name: str, added: Sequence[str]) -> None:
    """Raise DataError if the recipe's template writes special tokens that are not single tokens of the vocabulary.

    A checkpoint's own template is left alone: some checkpoints were trained with split ones (Zephyr).
    `added`: tokens that the recipe has already added.
    """
    tokens = template_tokens(tokenizer)
    if name in SHIPPED and name != "mistral":  # that of tokenizers in which [INST] is text
        tokens += dict.fromkeys(_MISTRAL_TOKEN.findall(_COMMENT.sub("", str(tokenizer.chat_template))))
    lengths = {token: len(tokenizer.encode(token, add_special_tokens=False)) for token in tokens}
    split = [token for token, length in lengths.items() if length > 1]
    if not split:
        return
    end = _token_after_answer(tokenizer)
    lines = f"model.added_tokens: [{', '.join(map(_quoted, [*added, *split]))}]"
    if end is not None and end != tokenizer.eos_token:
        lines += f" and model.eos_token: {_quoted(end)}"
    raise DataError(
        Problem(
            where="data.chat_template",
            what=f"{name} writes special tokens that this vocabulary lacks and would split into pieces",
            got=", ".join(f"{token} in {lengths[token]} pieces" for token in split),
            do=f"write {lines}, or name another template",
        )
    )


def check_unended_answers(tokenizer: Any) -> None:
    """Raise DataError where the recipe's template ends an answer with a token at which the checkpoint does not stop.

    Programs that serve the adapter stop at the checkpoint's tokens. Of its own template they know the end, and
    `generation_config.json` beside the adapter says it. All other problems of the template are reported, too.
    """
    chat = ChatTemplate(tokenizer, "the chat template")
    end = chat.text_end
    if end is None or end.token in chat.stops:
        return
    remaining = problems_of_template(chat)
    name = "name another template in data.chat_template"
    do = name if remaining else f"write model.eos_token: {_quoted(end.token)}, or {name}"
    what = f"the chat template ends an answer with {end.token}, at which this checkpoint does not stop"
    raise DataError([Problem("model.eos_token", what, do, ", ".join(chat.stops)), *remaining])


def _token_after_answer(tokenizer: Any) -> str | None:
    after = _probe(tokenizer).rpartition(_ANSWER)[2]
    match = _SPECIAL_TOKEN.match(after.lstrip())
    return match[0] if match else None


def _quoted(token: str) -> str:
    return '"' + token + '"'


def load_tokenizer(
    name_or_path: str,
    revision: str | None,
    chat_template: str | None,
    added_tokens: Sequence[str] = (),
    eos_token: str | None = None,
    pad_token: str | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> Any:
    """The tokenizer of a checkpoint, with `chat_template` (a shipped name or a file) in place of its own if given.

    `added_tokens`, `eos_token` and `pad_token` are those of the recipe's model, `template_args` those of its data. The
    tokens at which the checkpoint stops are kept with the tokenizer. Raises `WeightsError` for a tokenizer that cannot
    be used, `RecipeError` for tokens that do not fit it, and `DataError` for a template that cannot be read or that
    needs special tokens which the vocabulary lacks.
    """
    template = None if chat_template is None else read_template(chat_template)
    tokenizer = _load(name_or_path, revision)
    _add(tokenizer, added_tokens)
    _set_eos(tokenizer, eos_token, name_or_path)
    _set_pad(tokenizer, pad_token)
    set_stop_tokens(tokenizer, _tokens_of(tokenizer, stop_ids(Path(name_or_path))))
    set_template_args(tokenizer, template_args or {})
    if template is not None and template != tokenizer.chat_template:
        tokenizer.chat_template = template
        check_split_tokens(tokenizer, str(chat_template), added_tokens)
        check_unended_answers(tokenizer)
    if template_args:
        ChatTemplate(tokenizer, "the chat template")  # refuses variables that it does not read
    return tokenizer


def _load(name_or_path: str, revision: str | None) -> Any:
    # mistral_format: not mistral-common's own class, which is no fast tokenizer, where that package is installed.
    load = partial(read_tokenizer, name_or_path, revision=revision, mistral_format=False)
    tokenizer = load()
    if tokenizer.is_fast and getattr(tokenizer.backend_tokenizer, "fix_mistral_regex", None) is False:
        tokenizer = load(fix_mistral_regex=True)  # published with an expression that is not Mistral's
    if not tokenizer.is_fast:
        do = "use a checkpoint with a tokenizer.json"
        got = type(tokenizer).__name__
        raise WeightsError(Problem(where=name_or_path, what="not a fast tokenizer", got=got, do=do))
    file = getattr(tokenizer, "vocab_file", None)
    if tokenizer.eos_token is None and file is not None and Path(file).name == "tekken.json":
        # Mistral's file alone: AutoTokenizer leaves BOS and EOS unnamed.
        from transformers.integrations.mistral import convert_tekken_tokenizer  # it imports mistral-common

        with reading(file, "is not Mistral's file of a tokenizer"):
            return convert_tekken_tokenizer(file)
    return tokenizer


def _add(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Add special tokens, each with an id that no token had, above all others."""
    vocabulary = tokenizer.get_vocab()
    problems = [
        Problem(
            f"model.added_tokens[{index}]",
            f"the vocabulary has this token (id {vocabulary[token]}), with a row that the checkpoint trained",
            "remove it from the list: it need not be added",
            got=token,
        )
        for index, token in enumerate(tokens)
        if token in vocabulary
    ]
    if problems:
        raise RecipeError(problems)
    special = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_tokens(special, special_tokens=True)
    for index, token in enumerate(tokens):
        number = tokenizer.convert_tokens_to_ids(token)
        alone = tokenizer.encode(token, add_special_tokens=False)
        if number != max(vocabulary.values()) + 1 + index or alone != [number]:
            what = "this tokenizer does not give it an id of its own above all others"
            do = "write another name for the token, or use the tokenizer of another checkpoint"
            raise RecipeError(Problem(f"model.added_tokens[{index}]", what, do, got=f"{token} (id {number})"))


def added_ids(tokenizer: Any, added_tokens: Sequence[str]) -> list[int]:
    """The ids of the recipe's added tokens, ascending as they were added."""
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in added_tokens]


def _set_eos(tokenizer: Any, eos_token: str | None, where: str) -> None:
    if eos_token is not None:
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        if eos_token not in special:
            known = eos_token in tokenizer.get_vocab()
            what = "an ordinary token, which any text may contain" if known else "not a token of the vocabulary"
            do = "write a special token of the vocabulary" + ("" if known else ", or add it to model.added_tokens")
            raise RecipeError(Problem("model.eos_token", what, do, got=eos_token))
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token_id is None:
        do = "write model.eos_token, or set eos_token in its tokenizer_config.json: without it no answer would ever end"
        raise WeightsError(Problem(where=where, what="the tokenizer has no EOS token", do=do))


def _set_pad(tokenizer: Any, pad_token: str | None) -> None:
    """The token that fills up batches: `pad_token`, else the tokenizer's own, its unknown token or its EOS.

    It may be any of them: what is filled up is known by the rows' lengths. An ordinary token of the vocabulary may not
    be named, because a tokenizer that is loaded with it as its pad token cuts it out of every text.
    """
    if pad_token is None:
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
        return
    whole = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    if pad_token not in whole:
        known = pad_token in tokenizer.get_vocab()
        what = "an ordinary token, which any text may contain" if known else "not a token of the vocabulary"
        do = "write a special token of the vocabulary" + ("" if known else ", or add it to model.added_tokens")
        raise RecipeError(Problem("model.pad_token", what, f"{do}; the EOS may be used, too", got=pad_token))
    tokenizer.pad_token = pad_token


def _tokens_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The tokens with these ids, without ids that the vocabulary lacks: no text has those, so none can end with one."""
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    return [tokens[number] for number in ids if number in tokens]


def end_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The tokens at which the trained model is to stop: the EOS, the checkpoint's, and the ends of the template."""
    stops = stop_tokens(tokenizer)
    try:
        ends = ChatTemplate(tokenizer, "the chat template").end_tokens
    except DataError:  # No template, or none that can be read: rows that are rendered already need none.
        ends = ()
    return tuple(dict.fromkeys([*stops, *ends]))


def end_ids(tokenizer: Any, marks: Iterable[str | None] = ()) -> list[int]:
    """The ids of `end_tokens`, and of further marks as far as they are one token each."""
    vocabulary = tokenizer.get_vocab()
    ends = [*end_tokens(tokenizer), *(mark.strip() for mark in marks if mark is not None)]
    return list(dict.fromkeys(int(vocabulary[token]) for token in ends if token in vocabulary))
