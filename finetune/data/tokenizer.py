"""Load a tokenizer that training can rely on: fast, with a chat template and with a pad token that is not the EOS."""

from typing import Any

from transformers import AutoTokenizer

from finetune.data.chat_templates import read_template
from finetune.errors import Problem, WeightsError


def load_tokenizer(name_or_path: str, revision: str | None, chat_template: str | None) -> Any:
    """The tokenizer of a checkpoint, with `chat_template` (a shipped name or a file) in place of its own if given.

    No token is ever added: the embedding would lack it. Raises `WeightsError` for a tokenizer that cannot be used and
    `DataError` for a template that cannot be read.
    """
    template = None if chat_template is None else read_template(chat_template)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision)
    except (OSError, ValueError) as error:
        do = "give the folder of a checkpoint with its tokenizer files, or its name on the hub"
        got = str(error).strip().split("\n")[0]
        raise WeightsError(Problem(where=name_or_path, what="no tokenizer could be loaded", got=got, do=do)) from error
    if not tokenizer.is_fast:
        do = "use a checkpoint with a tokenizer.json"
        got = type(tokenizer).__name__
        raise WeightsError(Problem(where=name_or_path, what="not a fast tokenizer", got=got, do=do))
    _check_eos(tokenizer, name_or_path)
    _ensure_pad(tokenizer, name_or_path)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _check_eos(tokenizer: Any, where: str) -> None:
    if tokenizer.eos_token_id is None:
        do = "set eos_token in its tokenizer_config.json: without it no answer would ever end"
        raise WeightsError(Problem(where=where, what="the tokenizer has no EOS token", do=do))


def _ensure_pad(tokenizer: Any, where: str) -> None:
    """Pad = EOS would mask the EOS wherever pads are masked, and the model would never learn to stop."""
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return
    if tokenizer.unk_token_id in (None, tokenizer.eos_token_id):
        raise WeightsError(
            Problem(
                where=where,
                what="the tokenizer has no pad token other than its EOS",
                got=f"pad {tokenizer.pad_token!r}, unk {tokenizer.unk_token!r}, eos {tokenizer.eos_token!r}",
                do="set pad_token in its tokenizer_config.json to a token of the vocabulary that no text contains",
            )
        )
    tokenizer.pad_token = tokenizer.unk_token
