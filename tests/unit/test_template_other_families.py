"""Ways of published templates that no template of `trl` has, in their essential lines; « and » enclose what is trained.

Qwen3-Thinking-2507, DeepSeek-V3.1, GLM-4.7 and GLM-5, MiniMax-M2, Kimi-K2 and Kimi-K2-Thinking, ERNIE-4.5-Thinking,
Hunyuan-A13B, Command R7B.
"""

from collections.abc import Mapping
from typing import Any

import pytest

from finetune.data.row_errors import RowError
from finetune.data.types import Conversation, Message
from tests.rendering import chat, tool_call
from tests.templates import family_tokenizer, trained, wide

LAST_USER = (
    "{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
)
QWEN3_THINKING = (
    LAST_USER + "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' -}}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last -%}"
    "{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' -}}{%- endif -%}"
    "{{- m.content + '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"
)
DEEPSEEK_V3_1 = wide(
    "{{- bos_token -}}{%- set ns = namespace(user=false) -%}{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{%- set ns.user = true -%}{{- '<|User|>' + m.content -}}{%- endif -%}"
    "{%- if m.role == 'assistant' -%}{%- if ns.user -%}{{- '<|Assistant|></think>' -}}{%- endif -%}"
    "{%- set ns.user = false -%}{{- m.content -}}"
    "{%- if m.tool_calls is defined -%}{{- '<|tool▁calls▁begin|>' -}}{%- for call in m.tool_calls -%}"
    "{{- '<|tool▁call▁begin|>' + call.function.name + '<|tool▁sep|>' + call.function.arguments -}}"
    "{{- '<|tool▁call▁end|>' -}}{%- endfor -%}{{- '<|tool▁calls▁end|>' -}}{%- endif -%}"
    "{{- '<|end▁of▁sentence|>' -}}{%- endif -%}"
    "{%- if m.role == 'tool' -%}{{- '<|tool▁output▁begin|>' + m.content + '<|tool▁output▁end|>' -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt and ns.user -%}"
    "{{- '<|Assistant|>' + ('<think>' if thinking else '</think>') -}}{%- endif -%}"
)
GLM = (
    LAST_USER + "{{- '[gMASK]<sop>' -}}{%- for m in messages -%}{{- '<|' + m.role + '|>' -}}"
    "{%- if m.role == 'assistant' -%}{%- if loop.index0 > ns.last and m.reasoning_content -%}"
    "{{- '<think>' + m.reasoning_content + '</think>' -}}{%- else -%}{{- 'NOTHING' -}}{%- endif -%}{%- endif -%}"
    "{{- m.content -}}{%- endfor -%}{%- if add_generation_prompt -%}"
    "{{- '<|assistant|>' + ('<think>' if enable_thinking is not defined or enable_thinking else 'NOTHING') -}}"
    "{%- endif -%}"
)
GLM_4_7, GLM_5 = GLM.replace("NOTHING", "</think>"), GLM.replace("NOTHING", "<think></think>")
MINIMAX_M2 = (
    LAST_USER + "{{- ']~!b[]~b]system\\nYou are a helpful assistant.[e~[\\n' -}}{%- for m in messages -%}"
    "{{- ']~b]' + ('ai' if m.role == 'assistant' else 'user') + '\\n' -}}"
    "{%- if m.reasoning_content and loop.index0 > ns.last -%}"
    "{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' -}}{%- endif -%}"
    "{{- m.content + '[e~[\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- ']~b]ai\\n<think>\\n' -}}{%- endif -%}"
)
KIMI_K2 = (
    "{{- '<|im_system|>system<|im_middle|>You are Kimi<|im_end|>' -}}{%- for m in messages -%}"
    "{{- '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' + m.content + '<|im_end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_assistant|>assistant<|im_middle|>' -}}{%- endif -%}"
)
# Reasoning is kept in the calls behind the last answer in words, that is while no answer in words follows.
KIMI_K2_THINKING = (
    "{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}"
    "{%- if m.role == 'assistant' and not m.tool_calls -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}"
    "{{- '<|im_' + ('system' if m.role == 'tool' else m.role) + '|>' + m.role + '<|im_middle|>' -}}"
    "{%- if m.role == 'assistant' -%}"
    "{{- '<think>' + (m.reasoning_content or '' if loop.index0 > ns.last else '') + '</think>' -}}{%- endif -%}"
    "{{- m.content -}}{%- if m.tool_calls -%}{{- '<|tool_calls_section_begin|>' -}}{%- for call in m.tool_calls -%}"
    "{{- '<|tool_call_begin|>functions.' + call.function.name + ':0<|tool_call_argument_begin|>' -}}"
    "{{- call.function.arguments | tojson + '<|tool_call_end|>' -}}{%- endfor -%}"
    "{{- '<|tool_calls_section_end|>' -}}{%- endif -%}{{- '<|im_end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_assistant|>assistant<|im_middle|>' -}}{%- endif -%}"
)
ERNIE_THINKING = (
    "{{- '<|im_start|>system\\n<global_setting>\\nthink_mode=True\\n</global_setting><|im_end|>\\n\\n' -}}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' -}}"
    "{{- '<response>\\n' + m.content + '\\n</response>\\n' if m.role == 'assistant' else m.content -}}"
    "{{- '<|im_end|>\\n\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"
)
HUNYUAN = (
    "{%- for m in messages -%}"
    "{{- bos_token + m.content + '<|extra_0|>' if m.role == 'user' else m.content + eos_token -}}"
    "{%- endfor -%}{%- if add_generation_prompt and enable_thinking is defined and not enable_thinking -%}"
    "{{- '<think>\\n\\n</think>\\n' -}}{%- endif -%}"
)
# As Command R7B's: `add_generation_prompt` is not asked for.
COMMAND_R7B = (
    "{{- bos_token -}}{%- for m in messages -%}{{- '<|START_OF_TURN_TOKEN|>' -}}"
    "{{- '<|CHATBOT_TOKEN|><|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' if m.role == 'assistant' else "
    "'<|USER_TOKEN|>' + m.content -}}{{- '<|END_OF_TURN_TOKEN|>' -}}{%- endfor -%}"
    "{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}"
)

TWO = chat("One?", "It is one.", "Two?", "It is two.")
REASONED = Conversation([*TWO.messages[:3], Message(role="assistant", content="It is two.", reasoning="Count.")])
THINKING, NOT = {"thinking": True}, {"enable_thinking": False}


def _called(**reasoning: str) -> Conversation:
    """A call, its result and the answer; `reasoning` of the call and of the answer."""
    call = Message(role="assistant", content="", tool_calls=[tool_call("get_weather", city="Oslo")])
    said = Message(role="assistant", content="It is cold.")
    if "call" in reasoning:
        call["reasoning"] = reasoning["call"]
    if "answer" in reasoning:
        said["reasoning"] = reasoning["answer"]
    result = Message(role="tool", content="0 degrees", tool_call_id="abcdefghi", name="get_weather")
    return Conversation([Message(role="user", content="How is Oslo? Ask get_weather."), call, result, said])


CHATML_ONE = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
MINIMAX = "]~!b[]~b]system\nYou are a helpful assistant.[e~[\n]~b]user\nOne?[e~[\n]~b]ai\n"
KIMI = "<|im_system|>system<|im_middle|>You are Kimi<|im_end|><|im_user|>user<|im_middle|>"
KIMI_ASKED = "<|im_user|>user<|im_middle|>How is Oslo? Ask get_weather.<|im_end|><|im_assistant|>assistant<|im_middle|>"
KIMI_CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Oslo"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
)
ERNIE = (
    "<|im_start|>system\n<global_setting>\nthink_mode=True\n</global_setting><|im_end|>\n\n"
    "<|im_start|>user\nOne?<|im_end|>\n\n<|im_start|>assistant\n"
)
COHERE = "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>"
CASES: dict[str, tuple[str, str, Mapping[str, Any], Conversation, list[str]]] = {
    "Qwen3-Thinking-2507, two turns": (
        "qwen",
        QWEN3_THINKING,
        {},
        TWO,
        [
            f"{CHATML_ONE}<think>\n«\n</think>\n\nIt is one.<|im_end|>»",
            f"{CHATML_ONE}It is one.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
            "<think>\n«\n</think>\n\nIt is two.<|im_end|>»",
        ],
    ),
    "Qwen3-Thinking-2507, reasoning": (
        "qwen",
        QWEN3_THINKING,
        {},
        REASONED,
        [
            f"{CHATML_ONE}<think>\n«\n</think>\n\nIt is one.<|im_end|>»",
            f"{CHATML_ONE}It is one.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
            "<think>\n«Count.\n</think>\n\nIt is two.<|im_end|>»",
        ],
    ),
    "DeepSeek-V3.1, two turns": (
        "deepseek",
        DEEPSEEK_V3_1,
        {},
        TWO,
        [
            wide(
                "<|begin▁of▁sentence|><|User|>One?<|Assistant|></think>«It is one.<|end▁of▁sentence|>»"
                "<|User|>Two?<|Assistant|></think>«It is two.<|end▁of▁sentence|>»"
            )
        ],
    ),
    "DeepSeek-V3.1 thinking, two turns": (
        "deepseek",
        DEEPSEEK_V3_1,
        THINKING,
        TWO,
        [
            wide("<|begin▁of▁sentence|><|User|>One?<|Assistant|><think>«</think>It is one.<|end▁of▁sentence|>»"),
            wide(
                "<|begin▁of▁sentence|><|User|>One?<|Assistant|></think>It is one.<|end▁of▁sentence|>"
                "<|User|>Two?<|Assistant|><think>«</think>It is two.<|end▁of▁sentence|>»"
            ),
        ],
    ),
    "DeepSeek-V3.1 thinking, reasoning": (
        "deepseek",
        DEEPSEEK_V3_1,
        THINKING,
        REASONED,
        [
            wide("<|begin▁of▁sentence|><|User|>One?<|Assistant|><think>«</think>It is one.<|end▁of▁sentence|>»"),
            wide(
                "<|begin▁of▁sentence|><|User|>One?<|Assistant|></think>It is one.<|end▁of▁sentence|>"
                "<|User|>Two?<|Assistant|><think>«Count.</think>It is two.<|end▁of▁sentence|>»"
            ),
        ],
    ),
    "DeepSeek-V3.1, call": (
        "deepseek",
        DEEPSEEK_V3_1,
        {},
        _called(),
        [
            wide(
                "<|begin▁of▁sentence|><|User|>How is Oslo? Ask get_weather.<|Assistant|></think>«<|tool▁calls▁begin|>"
                '<|tool▁call▁begin|>get_weather<|tool▁sep|>{"city": "Oslo"}<|tool▁call▁end|><|tool▁calls▁end|>'
                "<|end▁of▁sentence|>»<|tool▁output▁begin|>0 degrees<|tool▁output▁end|>"
                "«It is cold.<|end▁of▁sentence|>»"
            )
        ],
    ),
    "GLM-4.7, two turns": (
        "glm",
        GLM_4_7,
        {},
        TWO,
        [
            "[gMASK]<sop><|user|>One?<|assistant|><think>«</think>It is one.<|user|>»",
            "[gMASK]<sop><|user|>One?<|assistant|></think>It is one.<|user|>Two?<|assistant|>"
            "<think>«</think>It is two.<|user|>»",
        ],
    ),
    "GLM-4.7, reasoning": (
        "glm",
        GLM_4_7,
        {},
        REASONED,
        [
            "[gMASK]<sop><|user|>One?<|assistant|><think>«</think>It is one.<|user|>»",
            "[gMASK]<sop><|user|>One?<|assistant|></think>It is one.<|user|>Two?<|assistant|>"
            "<think>«Count.</think>It is two.<|user|>»",
        ],
    ),
    "GLM-4.7 not thinking, two turns": (
        "glm",
        GLM_4_7,
        NOT,
        TWO,
        [
            "[gMASK]<sop><|user|>One?<|assistant|></think>«It is one.<|user|>»"
            "Two?<|assistant|></think>«It is two.<|user|>»"
        ],
    ),
    "GLM-5, two turns": (
        "glm",
        GLM_5,
        {},
        TWO,
        [
            "[gMASK]<sop><|user|>One?<|assistant|><think>«</think>It is one.<|user|>»"
            "Two?<|assistant|><think>«</think>It is two.<|user|>»"
        ],
    ),
    "MiniMax-M2, two turns": (
        "minimax",
        MINIMAX_M2,
        {},
        TWO,
        [
            f"{MINIMAX}<think>\n«\n</think>\n\nIt is one.[e~[»",
            f"{MINIMAX}It is one.[e~[\n]~b]user\nTwo?[e~[\n]~b]ai\n<think>\n«\n</think>\n\nIt is two.[e~[»",
        ],
    ),
    "MiniMax-M2, reasoning": (
        "minimax",
        MINIMAX_M2,
        {},
        REASONED,
        [
            f"{MINIMAX}<think>\n«\n</think>\n\nIt is one.[e~[»",
            f"{MINIMAX}It is one.[e~[\n]~b]user\nTwo?[e~[\n]~b]ai\n<think>\n«Count.\n</think>\n\nIt is two.[e~[»",
        ],
    ),
    "Kimi-K2, two turns": (
        "kimi",
        KIMI_K2,
        {},
        TWO,
        [
            f"{KIMI}One?<|im_end|><|im_assistant|>assistant<|im_middle|>«It is one.<|im_end|>»"
            "<|im_user|>user<|im_middle|>Two?<|im_end|><|im_assistant|>assistant<|im_middle|>«It is two.<|im_end|>»"
        ],
    ),
    "Kimi-K2-Thinking, two turns": (
        "kimi",
        KIMI_K2_THINKING,
        {},
        TWO,
        [
            "<|im_user|>user<|im_middle|>One?<|im_end|><|im_assistant|>assistant<|im_middle|>"
            "«<think></think>It is one.<|im_end|>»<|im_user|>user<|im_middle|>Two?<|im_end|>"
            "<|im_assistant|>assistant<|im_middle|>«<think></think>It is two.<|im_end|>»"
        ],
    ),
    "Kimi-K2-Thinking, reasoning before a call": (
        "kimi",
        KIMI_K2_THINKING,
        {},
        _called(call="Ask."),
        [
            f"{KIMI_ASKED}«<think>Ask.</think>{KIMI_CALL}»<|im_system|>tool<|im_middle|>0 degrees<|im_end|>"
            "<|im_assistant|>assistant<|im_middle|>«<think></think>It is cold.<|im_end|>»"
        ],
    ),
    "ERNIE-4.5-Thinking, two turns": (
        "ernie",
        ERNIE_THINKING,
        {},
        TWO,
        [
            f"{ERNIE}<think>\n«\n</think>\n\n<response>\nIt is one.\n</response>\n<|im_end|>»",
            f"{ERNIE}<response>\nIt is one.\n</response>\n<|im_end|>\n\n<|im_start|>user\nTwo?<|im_end|>\n\n"
            "<|im_start|>assistant\n<think>\n«\n</think>\n\n<response>\nIt is two.\n</response>\n<|im_end|>»",
        ],
    ),
    "Hunyuan, two turns": (
        "hunyuan",
        HUNYUAN,
        {},
        TWO,
        ["<|startoftext|>One?<|extra_0|>«It is one.<|eos|>»<|startoftext|>Two?<|extra_0|>«It is two.<|eos|>»"],
    ),
    "Hunyuan not thinking, two turns": (
        "hunyuan",
        HUNYUAN,
        NOT,
        TWO,
        [
            "<|startoftext|>One?<|extra_0|><think>\n\n</think>\n«It is one.<|eos|>»",
            "<|startoftext|>One?<|extra_0|>It is one.<|eos|><|startoftext|>Two?<|extra_0|>"
            "<think>\n\n</think>\n«It is two.<|eos|>»",
        ],
    ),
    "Command R7B, two turns": (
        "cohere",
        COMMAND_R7B,
        {},
        TWO,
        [
            f"<BOS_TOKEN>{COHERE}One?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
            f"«<|START_RESPONSE|>It is one.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>»{COHERE}Two?<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>«<|START_RESPONSE|>It is two.<|END_RESPONSE|>"
            "<|END_OF_TURN_TOKEN|>»"
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_trained(name: str) -> None:
    """What the template writes after the last answer is never supervised, and does not matter."""
    tokens, template, args, given, expected = CASES[name]
    texts = trained(family_tokenizer(tokens, template, args), given)
    assert [text[: text.rindex("»") + 1] for text in texts] == expected


REFUSED = {
    # The template drops the reasoning of every answer in words.
    "Kimi-K2-Thinking, reasoning of an answer": ("kimi", KIMI_K2_THINKING, {}, REASONED, "reasoning"),
    "Kimi-K2, reasoning": ("kimi", KIMI_K2, {}, REASONED, "reasoning"),
    # The prompt closes the block.
    "DeepSeek-V3.1 not thinking, reasoning": ("deepseek", DEEPSEEK_V3_1, {}, REASONED, "reasoning"),
    "GLM-4.7 not thinking, reasoning": ("glm", GLM_4_7, NOT, REASONED, "reasoning"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    tokens, template, args, given, message = REFUSED[name]
    with pytest.raises(RowError, match=message):
        trained(family_tokenizer(tokens, template, args), given)
