"""What published templates train, written by hand from reading them: « and » enclose what is supervised."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest

from finetune.data.render import set_template_day
from finetune.data.row_errors import RowError
from finetune.data.types import Conversation, Message
from tests.rendering import chat
from tests.templates import family_tokenizer, trained, trl_template, wide

ONE = chat("One?", "It is one.")
THREE = chat("One?", "It is one.", "Two?", "It is two.", "Three?", "It is three.")
REASONED = Conversation(
    [
        *ONE.messages,
        Message(role="user", content="Two?"),
        Message(role="assistant", content="It is two.", reasoning="Count."),
    ]
)


class Trained(NamedTuple):
    """The examples of one turn, of three, and of two with reasoning in the last answer, with `loss_on: assistant`.

    Each from `begin` on: the text before it (a system prompt of the template's own) is never supervised. `reasoned`
    is None where the template has no place for reasoning.
    """

    tokens: str
    begin: str
    one: str
    three: tuple[str, ...]
    reasoned: tuple[str, ...] | None = None
    args: Mapping[str, Any] = {}


CHATML_TURNS = (
    "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nIt is one.<|im_end|>\n",
    "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\nIt is two.<|im_end|>\n",
)


def _chatml(block: str, earlier: str = "") -> tuple[str, ...]:
    """Three turns in ChatML as three examples; `block` opens the answer that is supervised, `earlier` those before."""
    first, second = (turn.replace("assistant\n", f"assistant\n{earlier}") for turn in CHATML_TURNS)
    return (
        f"<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n{block}It is one.<|im_end|>»\n",
        f"{first}<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n{block}It is two.<|im_end|>»\n",
        f"{first}{second}<|im_start|>user\nThree?<|im_end|>\n<|im_start|>assistant\n{block}It is three.<|im_end|>»\n",
    )


def _chatml_reasoned(block: str, before: str, earlier: str = "") -> tuple[str, ...]:
    """`before`: how the answer without reasoning begins; `block`: the one with it."""
    first = CHATML_TURNS[0].replace("assistant\n", f"assistant\n{earlier}")
    return (
        _chatml(before)[0],
        f"{first}<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n{block}It is two.<|im_end|>»\n",
    )


QWEN3 = "«<think>\n\n</think>\n\n"
THINKING = "<think>\n«\n</think>\n\n"
NOT_THINKING = "<think>\n\n</think>\n\n«"
NANO = "<think>\n«\n</think>\n"
DEEPSEEK = {
    "one": "<|begin▁of▁sentence|><|User|>One?<|Assistant|><think>\n«\n</think>\n\nIt is one.<|end▁of▁sentence|>»",
    "two": (
        "<|begin▁of▁sentence|><|User|>One?<|Assistant|>It is one.<|end▁of▁sentence|>"
        "<|User|>Two?<|Assistant|><think>\n«\n</think>\n\nIt is two.<|end▁of▁sentence|>»"
    ),
    "three": (
        "<|begin▁of▁sentence|><|User|>One?<|Assistant|>It is one.<|end▁of▁sentence|>"
        "<|User|>Two?<|Assistant|>It is two.<|end▁of▁sentence|>"
        "<|User|>Three?<|Assistant|><think>\n«\n</think>\n\nIt is three.<|end▁of▁sentence|>»"
    ),
    "reasoned": (
        "<|begin▁of▁sentence|><|User|>One?<|Assistant|>It is one.<|end▁of▁sentence|>"
        "<|User|>Two?<|Assistant|><think>\n«Count.\n</think>\n\nIt is two.<|end▁of▁sentence|>»"
    ),
}
DEEPSEEK_R1 = Trained(
    "deepseek",
    wide("<|begin▁of▁sentence|>"),
    wide(DEEPSEEK["one"]),
    tuple(wide(DEEPSEEK[name]) for name in ("one", "two", "three")),
    tuple(wide(DEEPSEEK[name]) for name in ("one", "reasoned")),
)
GPTOSS_ONE = "<|start|>user<|message|>One?<|end|><|start|>assistant«<|channel|>final<|message|>It is one.<|return|>»"
GPTOSS_ONE_DONE = "<|start|>user<|message|>One?<|end|><|start|>assistant<|channel|>final<|message|>It is one.<|end|>"
GPTOSS_TWO_DONE = "<|start|>user<|message|>Two?<|end|><|start|>assistant<|channel|>final<|message|>It is two.<|end|>"
LLAMA = Trained(
    "llama3",
    "<|start_header_id|>user",
    "<|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«It is one.<|eot_id|>»",
    (
        "<|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«It is one.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nTwo?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«It is two.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nThree?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«It is three.<|eot_id|>»",
    ),
)
GEMMA = (
    "<|turn>user\nOne?<turn|>\n<|turn>model\n«It is one.<turn|>»\n"
    "<|turn>user\nTwo?<turn|>\n<|turn>model\n«It is two.<turn|>»\n"
    "<|turn>user\nThree?<turn|>\n<|turn>model\n«It is three.<turn|>»\n"
)
GEMMA_REASONED = (
    "<|turn>user\nOne?<turn|>\n<|turn>model\n«It is one.<turn|>»\n"
    "<|turn>user\nTwo?<turn|>\n<|turn>model\n«<|channel>thought\nCount.\n<channel|>It is two.<turn|>»\n"
)

TRAINED = [
    (
        "qwen3",
        Trained(
            "qwen",
            "<|im_start|>",
            _chatml(QWEN3)[0],
            _chatml(QWEN3),
            _chatml_reasoned("«<think>\nCount.\n</think>\n\n", QWEN3),
        ),
    ),
    (
        "qwen3",
        Trained(
            "qwen", "<|im_start|>", _chatml(NOT_THINKING)[0], _chatml(NOT_THINKING), args={"enable_thinking": False}
        ),
    ),
    (
        "qwen3_5_think",
        Trained(
            "qwen",
            "<|im_start|>",
            _chatml(THINKING)[0],
            _chatml(THINKING),
            _chatml_reasoned("<think>\n«Count.\n</think>\n\n", THINKING),
        ),
    ),
    (
        "qwen3_5_think",
        Trained(
            "qwen", "<|im_start|>", _chatml(NOT_THINKING)[0], _chatml(NOT_THINKING), args={"enable_thinking": False}
        ),
    ),
    ("qwen3_5_nothink", Trained("qwen", "<|im_start|>", _chatml(NOT_THINKING)[0], _chatml(NOT_THINKING))),
    ("deepseekv3", DEEPSEEK_R1),
    ("deepseek_r1_distill", DEEPSEEK_R1),
    (
        "glm4moe",
        Trained(
            "glm",
            "[gMASK]",
            "[gMASK]<sop><|user|>\nOne?<|assistant|>«\n<think></think>\nIt is one.<|user|>»",
            (
                "[gMASK]<sop><|user|>\nOne?<|assistant|>«\n<think></think>\nIt is one.<|user|>»"
                "\nTwo?<|assistant|>«\n<think></think>\nIt is two.<|user|>»"
                "\nThree?<|assistant|>«\n<think></think>\nIt is three.<|user|>»",
            ),
            (
                "[gMASK]<sop><|user|>\nOne?<|assistant|>«\n<think></think>\nIt is one.<|user|>»"
                "\nTwo?<|assistant|>«\n<think>Count.</think>\nIt is two.<|user|>»",
            ),
        ),
    ),
    (
        "glm4moe",
        Trained(
            "glm",
            "[gMASK]",
            "[gMASK]<sop><|user|>\nOne?/nothink<|assistant|>\n<think></think>«\nIt is one.<|user|>»",
            (
                "[gMASK]<sop><|user|>\nOne?/nothink<|assistant|>\n<think></think>«\nIt is one.<|user|>»"
                "\nTwo?/nothink<|assistant|>\n<think></think>«\nIt is two.<|user|>»"
                "\nThree?/nothink<|assistant|>\n<think></think>«\nIt is three.<|user|>»",
            ),
            args={"enable_thinking": False},
        ),
    ),
    (
        "gptoss",
        Trained(
            "gptoss",
            "<|start|>user",
            GPTOSS_ONE,
            (
                GPTOSS_ONE,
                f"{GPTOSS_ONE_DONE}<|start|>user<|message|>Two?<|end|>"
                "<|start|>assistant«<|channel|>final<|message|>It is two.<|return|>»",
                f"{GPTOSS_ONE_DONE}{GPTOSS_TWO_DONE}<|start|>user<|message|>Three?<|end|>"
                "<|start|>assistant«<|channel|>final<|message|>It is three.<|return|>»",
            ),
            (
                GPTOSS_ONE,
                f"{GPTOSS_ONE_DONE}<|start|>user<|message|>Two?<|end|>"
                "<|start|>assistant«<|channel|>analysis<|message|>Count.<|end|>"
                "<|start|>assistant<|channel|>final<|message|>It is two.<|return|>»",
            ),
        ),
    ),
    (
        "phi3_5",
        Trained(
            "phi",
            "<|user|>",
            "<|user|>\nOne?<|end|>\n<|assistant|>\n«It is one.<|end|>»\n<|endoftext|>",
            (
                "<|user|>\nOne?<|end|>\n<|assistant|>\n«It is one.<|end|>»\n"
                "<|user|>\nTwo?<|end|>\n<|assistant|>\n«It is two.<|end|>»\n"
                "<|user|>\nThree?<|end|>\n<|assistant|>\n«It is three.<|end|>»\n<|endoftext|>",
            ),
        ),
    ),
    (
        "nemotron_3_nano",
        Trained(
            "nemotron",
            "<|im_start|>user",
            _chatml(NANO)[0],
            _chatml(NANO, "<think></think>"),
            _chatml_reasoned("<think>\n«Count.\n</think>\n", NANO, "<think></think>"),
        ),
    ),
    (
        "nemotron_3_nano",
        Trained(
            "nemotron",
            "<|im_start|>user",
            _chatml("<think></think>«")[0],
            (
                "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n<think></think>«It is one.<|im_end|>»\n"
                "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n<think></think>«It is two.<|im_end|>»\n"
                "<|im_start|>user\nThree?<|im_end|>\n<|im_start|>assistant\n<think></think>«It is three.<|im_end|>»\n",
            ),
            args={"enable_thinking": False},
        ),
    ),
    (
        "gemma4_v5",
        Trained("gemma4", "<|turn>user", GEMMA[: GEMMA.index("<|turn>user\nTwo")], (GEMMA,), (GEMMA_REASONED,)),
    ),
    (
        "gemma4_v5",
        Trained(
            "gemma4",
            "<bos>",
            "<bos><|turn>system\n<|think|>\n<turn|>\n" + GEMMA[: GEMMA.index("<|turn>user\nTwo")],
            ("<bos><|turn>system\n<|think|>\n<turn|>\n" + GEMMA,),
            ("<bos><|turn>system\n<|think|>\n<turn|>\n" + GEMMA_REASONED,),
            {"enable_thinking": True},
        ),
    ),
    (
        "lfm2_2_5_v2",
        Trained(
            "lfm2",
            "<|startoftext|>",
            "<|startoftext|>" + _chatml("«")[0],
            (
                "<|startoftext|>"
                "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n«It is one.<|im_end|>»\n"
                "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n«It is two.<|im_end|>»\n"
                "<|im_start|>user\nThree?<|im_end|>\n<|im_start|>assistant\n«It is three.<|im_end|>»\n",
            ),
            (
                "<|startoftext|>"
                "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n«It is one.<|im_end|>»\n"
                "<|im_start|>user\nTwo?<|im_end|>\n"
                "<|im_start|>assistant\n«<think>Count.</think>It is two.<|im_end|>»\n",
            ),
        ),
    ),
    ("llama3_1", LLAMA),
    ("llama3_2", LLAMA),
    (
        "muse_glimmer",
        Trained(
            "muse",
            "<|start|>user",
            "<|start|>user<|message|>One?<|eot|><|start|>assistant« to=user<|message|>It is one.<|eot|>»",
            (
                "<|start|>user<|message|>One?<|eot|><|start|>assistant« to=user<|message|>It is one.<|eot|>»"
                "<|start|>user<|message|>Two?<|eot|><|start|>assistant« to=user<|message|>It is two.<|eot|>»"
                "<|start|>user<|message|>Three?<|eot|><|start|>assistant« to=user<|message|>It is three.<|eot|>»",
            ),
            (
                "<|start|>user<|message|>One?<|eot|><|start|>assistant« to=user<|message|>It is one.<|eot|>»"
                "<|start|>user<|message|>Two?<|eot|><|start|>assistant« to=self<|message|>Count.<|eom|>"
                "<|start|>assistant to=user<|message|>It is two.<|eot|>»",
            ),
        ),
    ),
    (
        "cohere2",
        Trained(
            "cohere",
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>One?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
            "<|START_RESPONSE|>«It is one.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>»",
            (
                "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>One?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
                "<|START_RESPONSE|>«It is one.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>»"
                "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Two?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
                "<|START_RESPONSE|>«It is two.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>»"
                "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Three?<|END_OF_TURN_TOKEN|>"
                "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
                "<|START_RESPONSE|>«It is three.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>»",
            ),
        ),
    ),
]
CASES = [
    pytest.param(name, case, id=" ".join([name, *(f"{key}={value}" for key, value in case.args.items())]))
    for name, case in TRAINED
]


@pytest.mark.parametrize(("name", "expected"), CASES)
def test_one_turn(name: str, expected: Trained) -> None:
    assert _examples(name, expected, ONE) == [expected.one]


@pytest.mark.parametrize(("name", "expected"), CASES)
def test_three_turns(name: str, expected: Trained) -> None:
    assert _examples(name, expected, THREE) == list(expected.three)


@pytest.mark.parametrize(("name", "expected"), CASES)
def test_reasoning_in_the_last_answer(name: str, expected: Trained) -> None:
    if expected.reasoned is None:
        with pytest.raises(RowError, match="reasoning"):
            _examples(name, expected, REASONED)
    else:
        assert _examples(name, expected, REASONED) == list(expected.reasoned)


def _examples(name: str, expected: Trained, given: Conversation) -> list[str]:
    tokenizer = family_tokenizer(expected.tokens, trl_template(name), expected.args)
    set_template_day(tokenizer, "2026-01-31")
    texts = []
    for text in trained(tokenizer, given):
        begin = text.index(expected.begin)
        assert "«" not in text[:begin]
        texts.append(text[begin:])
    return texts
