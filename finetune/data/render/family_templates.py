"""The table of the families' published chat templates: prompts, ends of answers, reasoning, tool calls, variables.

It is for people: `finetune families NAME` prints a family's rows, and docs/chat-templates.md holds all of them. Masks
are made from the template itself (`ChatTemplate`, `Renderer`), never from this table. Rows with `trl` or `mistral` are
compared with that template by the tests; what the others were read from is in `source`.
"""

from dataclasses import dataclass, replace
from typing import Literal

Calls = Literal["JSON object", "JSON text", "parameters", "content only", ""]
Split = Literal["several answers", "a system message", "tools", "reasoning"]


@dataclass(frozen=True)
class PublishedTemplate:
    """What one published chat template does; the other fields are unknown where `ends` is None.

    A row is one template: a family has several where its models differ.
    """

    models: str  # published models that carry it
    source: str = ""  # where it was read; empty: it was not seen
    trl: str = ""  # its name in trl/chat_templates
    mistral: str = ""  # version and tokenizer kind in mistral-common, which generates the template
    ends: tuple[str, str] | None = None  # what ends an answer, and a call
    prompt: str = ""  # how the generation prompt ends
    header: str = ""  # what the model writes itself before an answer without reasoning
    closing: str = ""  # what closes the block that the prompt opens
    reasoning: str = ""  # the key that an assistant message's reasoning is read from
    splits: tuple[Split, ...] = ()  # conversations that become one example for each answer with loss_on: assistant
    calls: Calls = ""  # form of arguments; content only: calls are not written; empty: the template was not seen
    parallel: bool = False  # several calls in one message
    lists_tools: bool = True  # whether the definitions of a row's tools are written
    variables: tuple[str, ...] = ()  # for data.template_args
    pad: str = ""  # pad token of the published tokenizer
    note: str = ""


_ALWAYS: tuple[Split, ...] = ("several answers",)
_IM_END = ("<|im_end|>", "<|im_end|>")
_CHATML = "<|im_start|>assistant\n"
_EMPTY_BLOCK = "<think>\n\n</think>\n\n"
_DEEPSEEK_END = ("<\uff5cend\u2581of\u2581sentence\uff5c>",) * 2
_DEEPSEEK = "<\uff5cAssistant\uff5c>"
_PAD_IS_EOS = "the EOS token"
_NO_PAD = "none"
_LLAMA_CPP = "llama.cpp: models/templates"
_MS_SWIFT = "ms-swift: swift/template/templates"

_MISTRAL_V1 = PublishedTemplate(
    models="Mistral-7B-Instruct-v0.1 and -v0.2",
    source="llama.cpp: tests/test-chat-template.cpp",
    mistral="v1 spm",
    ends=("</s>", "</s>"),
    prompt=" [/INST]",
    header=" ",
    calls="content only",
    pad=_NO_PAD,
)
_MISTRAL_V3 = replace(
    _MISTRAL_V1,
    models="Mistral-7B-Instruct-v0.3",
    mistral="v3 spm",
    prompt="[/INST]",
    splits=("a system message", "tools"),
    calls="JSON object",
    parallel=True,
    note="tools and the system message are written before the last user message only; ids of calls have 9 characters",
)
_MISTRAL_V7 = replace(
    _MISTRAL_V3,
    models="Mistral Small 3 (tokenizer v7)",
    source="",
    mistral="v7 tekken",
    header="",
    splits=("tools",),
    pad="<pad>",
    note="tools are written before the last user message only; ids of calls have 9 characters",
)
_MISTRAL_V13 = replace(
    _MISTRAL_V7,
    models="Magistral (tokenizer v13)",
    mistral="v13 tekken think",
    splits=(),
    reasoning="reasoning_content",
    note="reasoning is written as [THINK]...[/THINK]",
)
_QWEN3_HYBRID = PublishedTemplate(
    models="Qwen3-30B-A3B, Qwen3-235B-A22B",
    trl="qwen3",
    ends=_IM_END,
    prompt=_CHATML,
    header=_EMPTY_BLOCK,
    reasoning="reasoning_content",
    splits=_ALWAYS,
    calls="JSON object",
    parallel=True,
    variables=("enable_thinking",),
    pad="<|endoftext|>",
    note="enable_thinking: false moves the empty block into the prompt; blocks of earlier turns are dropped",
)
_QWEN3_INSTRUCT = replace(
    _QWEN3_HYBRID,
    models="Qwen3-30B-A3B-Instruct-2507, Qwen3-235B-A22B-Instruct-2507",
    trl="qwen3_instruct_2507",
    header="",
    reasoning="",
    splits=(),
    variables=(),
    note="",
)
_GLM_45 = PublishedTemplate(
    models="GLM-4.5, GLM-4.5-Air, GLM-4.6",
    source=f"{_LLAMA_CPP}/GLM-4.6.jinja",
    trl="glm4moe",
    ends=("<|user|>", "<|observation|>"),
    prompt="<|assistant|>",
    header="\n<think></think>\n",
    reasoning="reasoning_content",
    splits=("reasoning",),
    calls="parameters",
    parallel=True,
    variables=("enable_thinking",),
    pad=_PAD_IS_EOS,
    note="the next speaker's mark ends an answer; enable_thinking: false moves the empty block into the prompt",
)
_GLM_47 = replace(
    _GLM_45,
    models="GLM-4.7-Flash",
    source=f"{_LLAMA_CPP}/GLM-4.7-Flash.jinja",
    trl="",
    prompt="<|assistant|><think>",
    header="",
    closing="</think>",
    splits=_ALWAYS,
    variables=("clear_thinking", "enable_thinking"),
    note="the next speaker's mark ends an answer; enable_thinking: false closes the block in the prompt",
)
_DEEPSEEK_R1 = PublishedTemplate(
    models="DeepSeek-R1, DeepSeek-V3",
    trl="deepseekv3",
    ends=_DEEPSEEK_END,
    prompt=f"{_DEEPSEEK}<think>\n",
    closing="\n</think>\n\n",
    splits=_ALWAYS,
    calls="JSON text",
    parallel=True,
    lists_tools=False,
    pad=_PAD_IS_EOS,
    note="reads no reasoning field: the row's reasoning is written into the block that the prompt opens",
)
_LLAMA3 = PublishedTemplate(
    models="Meta-Llama-3-8B-Instruct",
    trl="llama3",
    ends=("<|eot_id|>", "<|eot_id|>"),
    prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
    calls="content only",
    pad=_NO_PAD,
)
_LLAMA31 = replace(
    _LLAMA3,
    models="Llama-3.1-8B-Instruct",
    trl="llama3_1",
    calls="JSON object",
    variables=("builtin_tools", "custom_tools", "date_string", "tools_in_user_message"),
    note="arguments are written under the key parameters; several calls in one message are an error",
)
_LLAMA32 = replace(
    _LLAMA31,
    models="Llama-3.2-3B-Instruct",
    trl="llama3_2",
    variables=("custom_tools", "date_string", "tools_in_user_message"),
    note=f"writes the day; {_LLAMA31.note}",
)
_GRANITE = PublishedTemplate(
    models="granite-3.0-1b-a400m-instruct, granite-3.0-3b-a800m-instruct",
    source="llama.cpp: tests/test-chat-template.cpp (granite-3.0-8b-instruct; the file of a MoE model was not seen)",
    ends=("<|end_of_text|>", "<|end_of_text|>"),
    prompt="<|start_of_role|>assistant<|end_of_role|>",
    calls="content only",
    pad=_PAD_IS_EOS,
    note="tools are listed, but calls are plain content (<|tool_call|> and a JSON list)",
)
FAMILY_TEMPLATES: dict[str, tuple[PublishedTemplate, ...]] = {
    "mixtral": (
        replace(_MISTRAL_V1, models="Mixtral-8x7B-Instruct-v0.1"),
        replace(_MISTRAL_V3, models="Mixtral-8x22B-Instruct-v0.1"),
    ),
    "qwen2_moe": (
        PublishedTemplate(
            models="Qwen1.5-MoE-A2.7B-Chat, Qwen2-57B-A14B-Instruct",
            source="Qwen: finetune.py of Qwen1.5 (the file of a MoE model was not seen)",
            ends=_IM_END,
            prompt=_CHATML,
            calls="content only",
            pad="<|endoftext|>",
        ),
    ),
    "qwen3_moe": (
        _QWEN3_HYBRID,
        _QWEN3_INSTRUCT,
        replace(
            _QWEN3_HYBRID,
            models="Qwen3-30B-A3B-Thinking-2507, Qwen3-235B-A22B-Thinking-2507",
            source="unsloth: chat_templates.py (qwen3-thinking)",
            trl="",
            prompt=f"{_CHATML}<think>\n",
            header="",
            closing="\n</think>\n\n",
            variables=(),
            note="blocks of earlier turns are dropped",
        ),
        replace(
            _QWEN3_INSTRUCT,
            models="Qwen3-Coder-30B-A3B-Instruct",
            source=f"{_LLAMA_CPP}/Qwen3-Coder.jinja",
            trl="",
            calls="parameters",
            note="",
        ),
    ),
    "qwen3_next": (PublishedTemplate(models="Qwen3-Next-80B-A3B-Instruct, -Thinking"),),
    "deepseek_v2": (
        PublishedTemplate(
            models="DeepSeek-V2-Chat, DeepSeek-V2-Lite-Chat",
            source="llama.cpp: tests/test-chat-template.cpp",
            ends=_DEEPSEEK_END,
            prompt="Assistant:",
            header=" ",
            calls="content only",
            pad=_PAD_IS_EOS,
            note="the space after the prompt is the answer's first character",
        ),
    ),
    "deepseek_v3": (
        _DEEPSEEK_R1,
        replace(
            _DEEPSEEK_R1,
            models="DeepSeek-V3.1",
            source=f"{_LLAMA_CPP}/deepseek-ai-DeepSeek-V3.1.jinja",
            trl="",
            prompt=f"{_DEEPSEEK}</think>",
            closing="",
            splits=(),
            variables=("thinking",),
            note="thinking: true opens <think> in the prompt, and a conversation with several answers is then split",
        ),
    ),
    "glm4_moe": (_GLM_45, PublishedTemplate(models="GLM-4.7")),
    "glm4_moe_lite": (_GLM_47,),
    "dots1": (
        PublishedTemplate(
            models="dots.llm1.inst",
            source=f"llama.cpp: src/llama-chat.cpp, {_MS_SWIFT}/llm.py (the template itself was not seen)",
            ends=("<|endofresponse|>", ""),
            prompt="<|response|>",
        ),
    ),
    "exaone_moe": (
        PublishedTemplate(
            models="K-EXAONE-236B-A23B",
            source="transformers: modeling_exaone_moe.py, a rendering without thinking (the template was not seen)",
            ends=("<|endofturn|>", ""),
            prompt="<|assistant|>\n",
            variables=("enable_thinking",),
            note="enable_thinking: false writes an empty think block before the answer",
        ),
    ),
    "mimo_v2_flash": (
        PublishedTemplate(
            models="MiMo-V2-Flash",
            source=f"{_MS_SWIFT}/mimo.py (the template itself was not seen)",
            ends=("<|im_end|>", ""),
            prompt=_CHATML,
            note="no line break between turns",
        ),
    ),
    "mellum": (PublishedTemplate(models="Mellum2-12B-A2.5B-Instruct, -Thinking"),),
    "solar_open": (PublishedTemplate(models="Solar-Open-100B"),),
    "ernie4_5_moe": (
        PublishedTemplate(
            models="ERNIE-4.5-21B-A3B-PT",
            source="transformers: convert_ernie4_5_tokenizer.py (the default template of ERNIE 4.5's tokenizers)",
            ends=("<|end_of_sentence|>", "<|end_of_sentence|>"),
            prompt="Assistant: ",
            calls="content only",
            note="<|end_of_sentence|> is the tokenizer's sep_token, not its EOS",
        ),
    ),
    "hunyuan_v1_moe": (
        PublishedTemplate(
            models="Hunyuan-A13B-Instruct",
            source="vLLM: examples/tool_chat_template_hunyuan_a13b.jinja",
            ends=("<|eos|>", "<|eos|>"),
            prompt="<|extra_0|>",
            calls="JSON object",
            parallel=True,
            variables=("enable_thinking",),
            note="writes the time beside tools; enable_thinking: false writes the empty block after the answer, too",
        ),
    ),
    "olmoe": (PublishedTemplate(models="OLMoE-1B-7B-0924-Instruct"),),
    "flex_olmo": (PublishedTemplate(models="FlexOlmo-7x7B-1T (a base model)"),),
    "mistral4": (
        replace(
            _MISTRAL_V13,
            models="Mistral Small 4 (tokenizer v15)",
            mistral="v15 tekken think",
            variables=("reasoning_effort",),
            note="reasoning_effort: none or high, written into the prompt; reasoning is written as [THINK]...[/THINK]",
        ),
    ),
    "gpt_oss": (
        PublishedTemplate(
            models="gpt-oss-20b, gpt-oss-120b",
            trl="gptoss",
            ends=("<|return|>", "<|call|>"),
            prompt="<|start|>assistant",
            header="<|channel|>final<|message|>",
            reasoning="thinking",
            splits=_ALWAYS,
            calls="JSON object",
            variables=("builtin_tools", "model_identity", "reasoning_effort"),
            note="writes the day; an earlier answer ends in <|end|>; a second call of one message is dropped",
        ),
    ),
    "phimoe": (
        PublishedTemplate(
            models="Phi-3.5-MoE-instruct",
            source="the template of Phi-3.5 (the file of the MoE model was not seen)",
            trl="phi3_5",
            ends=("<|end|>", "<|end|>"),
            prompt="<|assistant|>\n",
            calls="content only",
            note="<|endoftext|> closes a finished conversation and is not part of an answer",
        ),
    ),
    "granitemoe": (
        _GRANITE,
        replace(
            _GRANITE,
            models="granite-3.1-1b-a400m-instruct, granite-3.1-3b-a800m-instruct",
            source=f"{_LLAMA_CPP}/ibm-granite-granite-3.3-2B-Instruct.jinja (the file of a MoE model was not seen)",
            variables=("controls", "documents", "thinking"),
            note="writes the day; tools are listed, but calls are plain content",
        ),
    ),
    "granitemoeshared": (PublishedTemplate(models="moe-7b-1b-active-shared-experts (a base model)"),),
    "jamba": (PublishedTemplate(models="AI21-Jamba-Mini-1.5, AI21-Jamba-Mini-1.7"),),
    "minimax": (
        PublishedTemplate(
            models="MiniMax-Text-01",
            source=f"{_MS_SWIFT}/minimax.py (the template itself was not seen)",
            ends=("<end_of_sentence>", ""),
            prompt="<beginning_of_sentence>ai name=assistant\n",
        ),
    ),
    "minimax_m2": (
        PublishedTemplate(
            models="MiniMax-M2",
            source=f"{_LLAMA_CPP}/MiniMax-M2.jinja",
            ends=("[e~[", "[e~["),
            prompt="]~b]ai\n<think>\n",
            closing="\n</think>\n\n",
            reasoning="reasoning_content",
            splits=_ALWAYS,
            calls="parameters",
            parallel=True,
            variables=("model_identity",),
        ),
    ),
    "llama": (_LLAMA3, _LLAMA31, _LLAMA32),
    "mistral": (
        _MISTRAL_V1,
        _MISTRAL_V3,
        replace(_MISTRAL_V3, models="Mistral-Nemo-Instruct-2407", mistral="v3 tekken", header="", pad="<pad>"),
        _MISTRAL_V7,
        _MISTRAL_V13,
    ),
}
