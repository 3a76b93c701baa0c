"""The chat templates of published models, out of the package `trl`, with small tokenizers that have their tokens."""

import copy
import functools
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from finetune.data.render import LossOn, Renderer, set_stop_tokens, set_template_args
from finetune.data.row_errors import RowError
from finetune.data.types import Conversation

_FOLDER = files("trl") / "chat_templates"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Tokens(NamedTuple):
    """The added tokens of a family as published. `special` and `plain` are separated by spaces.

    `stops` is the list `eos_token_id` of its generation config.
    """

    eos: str
    bos: str | None
    pad: str | None
    special: str
    plain: str = ""
    stops: tuple[str, ...] = ()


def wide(text: str) -> str:
    """The text with the vertical lines of DeepSeek's tokens."""
    return text.replace("|", "\N{FULLWIDTH VERTICAL LINE}")


COHERE = "<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|>"
GEMMA4 = (
    '<|turn> <turn|> <|channel> <channel|> <|think|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> <|"|>'
)
QWEN = "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response>"
DEEPSEEK = wide(
    "<|User|> <|Assistant|> <think> </think> <|tool▁calls▁begin|> <|tool▁calls▁end|> <|tool▁call▁begin|> "
    "<|tool▁call▁end|> <|tool▁sep|> <|tool▁outputs▁begin|> <|tool▁outputs▁end|> <|tool▁output▁begin|> "
    "<|tool▁output▁end|>"
)
GLM = f"{QWEN} <arg_key> </arg_key> <arg_value> </arg_value>"

TOKENS = {
    "cohere": Tokens("<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", "<PAD>", COHERE, "<|START_RESPONSE|> <|END_RESPONSE|>"),
    "deepseek": Tokens(
        wide("<|end▁of▁sentence|>"), wide("<|begin▁of▁sentence|>"), wide("<|end▁of▁sentence|>"), "", DEEPSEEK
    ),
    "ernie": Tokens("</s>", "<s>", "<unk>", "<|im_start|> <|im_end|>", "<think> </think>", ("</s>", "<|im_end|>")),
    "gemma": Tokens("<eos>", "<bos>", "<pad>", "<start_of_turn> <end_of_turn>", stops=("<eos>", "<end_of_turn>")),
    "gemma4": Tokens("<eos>", "<bos>", "<pad>", GEMMA4, stops=("<eos>", "<turn|>", "<|tool_response>")),
    "glm": Tokens(
        "<|endoftext|>",
        None,
        "<|endoftext|>",
        "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>",
        GLM,
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
    "gptoss": Tokens(
        "<|return|>",
        "<|startoftext|>",
        "<|endoftext|>",
        "<|start|> <|end|> <|message|> <|channel|> <|call|> <|constrain|>",
        stops=("<|return|>", "<|endoftext|>", "<|call|>"),
    ),
    "hunyuan": Tokens(
        "<|eos|>", "<|startoftext|>", "<|pad|>", "<|extra_0|> <|extra_4|>", "<think> </think> <answer> </answer>"
    ),
    "idefics": Tokens("<end_of_utterance>", "<|begin_of_text|>", "<pad>", "<image>"),
    "kimi": Tokens(
        "<|im_end|>",
        "[BOS]",
        "[PAD]",
        "<|im_user|> <|im_assistant|> <|im_system|> <|im_middle|> <|tool_calls_section_begin|> "
        "<|tool_calls_section_end|> <|tool_call_begin|> <|tool_call_argument_begin|> <|tool_call_end|>",
    ),
    "lfm2": Tokens(
        "<|im_end|>",
        "<|startoftext|>",
        "<|pad|>",
        "<|im_start|> <|tool_list_start|> <|tool_list_end|> <|tool_call_start|> <|tool_call_end|> "
        "<|tool_response_start|> <|tool_response_end|>",
        "<think> </think>",
    ),
    "llama3": Tokens(
        "<|eot_id|>",
        "<|begin_of_text|>",
        None,
        "<|end_of_text|> <|eom_id|> <|start_header_id|> <|end_header_id|> <|python_tag|>",
        stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    "minimax": Tokens("[e~[", None, "]!p~[", "]~!b[ ]~b]", "<think> </think> <minimax:tool_call> </minimax:tool_call>"),
    "mistral": Tokens("</s>", "<s>", "<pad>", "[INST] [/INST] <image>"),
    "muse": Tokens("<|eot|>", "<|begin_of_text|>", "<|pad|>", "<|start|> <|message|> <|eom|>"),
    "nemotron": Tokens("<|im_end|>", "<s>", "<unk>", "<|im_start|>", QWEN),
    "phi": Tokens(
        "<|endoftext|>",
        "<s>",
        "<|endoftext|>",
        "<|system|> <|user|> <|assistant|> <|end|>",
        stops=("<|endoftext|>", "<|assistant|>", "<|end|>"),
    ),
    "qwen": Tokens(
        "<|im_end|>",
        None,
        "<|endoftext|>",
        "<|im_start|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>",
        QWEN,
        ("<|im_end|>", "<|endoftext|>"),
    ),
    "smolvlm": Tokens("<end_of_utterance>", "<|im_start|>", "<|im_end|>", "<image>"),
}


def trl_templates() -> list[str]:
    """The names of all templates in the package."""
    return sorted(file.name.removesuffix(".jinja") for file in _FOLDER.iterdir() if file.name.endswith(".jinja"))


@functools.cache
def trl_template(name: str) -> str:
    """The source of one."""
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


@functools.cache
def _bare() -> str:
    """A byte-level BPE that cuts words as those of Llama 3, Qwen and DeepSeek do: two line breaks are one token."""
    bpe = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    bpe.train_from_iterator(["\n\n", "turn on the kitchen light and set the timer to ten minutes"] * 4, trainer)
    return bpe.to_str()


@functools.cache
def _tokenizer(family: str) -> Any:
    return with_tokens_of(family, _bare())


def with_tokens_of(family: str, bare: str) -> Any:
    """The tokenizer of this JSON with the added tokens of a family."""
    tokens = TOKENS[family]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bare),
        eos_token=tokens.eos,
        pad_token=tokens.pad,
        bos_token=tokens.bos,
        clean_up_tokenization_spaces=False,
    )
    special = [*tokens.special.split(), *tokens.stops]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens.plain.split()])
    return tokenizer


def family_tokenizer(
    family: str, template: str, args: Mapping[str, Any] | None = None, stops: Sequence[str] | None = None
) -> Any:
    """The tokenizer of a family with a template's source, `data.template_args` and stop tokens (None: as published)."""
    tokenizer = copy.copy(_tokenizer(family))
    tokenizer.chat_template = template
    set_template_args(tokenizer, args or {})
    set_stop_tokens(tokenizer, TOKENS[family].stops if stops is None else stops)
    return tokenizer


def trained(tokenizer: Any, given: Conversation, loss_on: LossOn = "assistant") -> list[str]:
    """The text of each example of a conversation, what is supervised between « and »; raises the first error."""
    renderer = Renderer(tokenizer, "its template", loss_on)
    texts = []
    for tokens in renderer.tokenise(renderer.examples(given)):
        if isinstance(tokens, RowError):
            raise tokens
        pieces = marked(tokenizer, tokens.input_ids.tolist(), tokens.labels.tolist())
        texts.append("".join(f"«{piece[1:]}»" if piece.startswith("*") else piece for piece in pieces))
    return texts


def marked(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> list[str]:
    """The text in pieces; those that are supervised begin with an asterisk."""
    pieces: list[tuple[bool, list[int]]] = []
    for token, label in zip(ids, labels, strict=True):
        if not pieces or pieces[-1][0] != (label == token):
            pieces.append((label == token, []))
        pieces[-1][1].append(token)
    return ["*" * on + tokenizer.decode(piece) for on, piece in pieces]
