"""What works with which chat template of the package `trl`, and the conversations that are tried with each."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from finetune.data.types import Conversation, Message
from tests.rendering import chat, tool_call, tool_schema
from tests.template_oracle import Family
from tests.templates import wide


def _asked(*turns: Message, tools: tuple[str, ...] = ("get_weather",)) -> Conversation:
    """A question about the weather and what follows it."""
    return Conversation([Message(role="user", content="How is Oslo?"), *turns], [tool_schema(name) for name in tools])


def _called(*cities: str, reasoning: str | None = None, content: str = "") -> Message:
    """Calls of the weather, one a city."""
    calls = [tool_call("get_weather", f"call0000{place}", city=city) for place, city in enumerate(cities)]
    message = Message(role="assistant", content=content, tool_calls=calls)
    return message if reasoning is None else {**message, "reasoning": reasoning}


def _result(place: int = 0) -> Message:
    return Message(role="tool", content=f"{place} degrees", tool_call_id=f"call0000{place}", name="get_weather")


def _said(content: str, reasoning: str | None = None) -> Message:
    message = Message(role="assistant", content=content)
    return message if reasoning is None else {**message, "reasoning": reasoning}


def _system(content: str) -> Message:
    return Message(role="system", content=content)


def _user(content: str) -> Message:
    return Message(role="user", content=content)


CONVERSATIONS = {
    "one turn": chat("Wie heißt das?", "Café au lait, 咖啡."),
    "three turns": chat("One?", "It is one.", "Two?", "It is two.\nYes.", "Three?", "It is three."),
    "system": chat("One?", "It is one.", system="Count in base seven."),
    "call": _asked(_called("Oslo"), _result(), _said("It is cold.")),
    "call, then a question": _asked(_called("Oslo"), _result(), _said("It is cold."), _user("Sure?"), _said("Yes.")),
    "call of a tool in the system message": Conversation(
        [_system("You may call get_weather."), *_asked(_called("Oslo"), _result(), _said("It is cold.")).messages]
    ),
    "two rounds of calls": _asked(_called("Oslo"), _result(), _called("Rome"), _result(), _said("Both are cold.")),
    "parallel calls": _asked(_called("Oslo", "Rome"), _result(0), _result(1), _said("Both are cold.")),
    "reasoning in the first answer": Conversation(
        [_user("One?"), _said("It is one.", "Count.\nSlowly."), _user("Two?"), _said("It is two.")]
    ),
    "reasoning in the last answer": Conversation(
        [_user("One?"), _said("It is one."), _user("Two?"), _said("It is two.", "Count.\nSlowly.")]
    ),
    "reasoning before a call": _asked(
        _called("Oslo", reasoning="Ask."), _result(), _said("It is cold.", "Zero is cold.")
    ),
    "reasoning in two rounds of calls": _asked(
        *(_called("Oslo", reasoning="Ask."), _result(), _called("Rome", reasoning="Ask again."), _result()),
        *(_said("Both are cold.", "Zero is cold."), _user("Sure?"), _said("Yes.", "Zero.")),
    ),
    "words beside a call": _asked(_called("Oslo", content="Let me look."), _result(), _said("It is cold.")),
    "short words": Conversation(
        [_user("A?"), _said("a"), _user("I?"), _said("in", "a"), _user("O?"), _said("o", "analysis")]
    ),
    "empty answer": chat("One?", "It is one.", "Two?", ""),
}
REASONING = tuple(name for name, given in CONVERSATIONS.items() if any("reasoning" in each for each in given.messages))
CALLS = tuple(name for name in CONVERSATIONS if "call" in name)


class Use(NamedTuple):
    """A template with `data.template_args`.

    `three_turns`: how many examples three turns become with `loss_on: assistant`. `refused`: conversations (or
    conversation / loss_on) -> the message.
    """

    three_turns: int
    refused: Mapping[str, str] = {}
    args: Mapping[str, Any] = {}


class Template(NamedTuple):
    """A template of `trl`: the tokens that belong to it, what the oracle must know, and its uses."""

    tokens: str
    family: Family
    uses: tuple[Use, ...]


# Reasoning of an answer that is not supervised is left out, as at inference.
SUPERVISED_REASONING = (
    "reasoning in the first answer/assistant",
    "reasoning in the last answer",
    "reasoning before a call",
    "reasoning in two rounds of calls",
    "short words",
)
NO_SYSTEM = {"system": "has no system role", "call of a tool in the system message": "has no system role"}
NO_REASONING = dict.fromkeys(SUPERVISED_REASONING, "drops the reasoning of this answer")
CLOSED = dict.fromkeys(SUPERVISED_REASONING, "the generation prompt closes the block for it")
ONE_CALL = {
    "parallel calls": "writes one call of an answer and drops the others|only supports single tool-calls at once"
}
# The reason depends on the row: the tools, the calls, a result, or reasoning beside a call.
NO_TOOLS = dict.fromkeys(
    CALLS,
    "drops the tools|drops or changes a tool call|writes one call of an answer and drops the others"
    "|refuses the conversation|drops the reasoning of this answer",
)
DEEPSEEK_TOOLS = {
    **{name: "drops the tools" for name in CALLS if CONVERSATIONS[name].tools},
    # Its template counts calls once for the whole conversation.
    "two rounds of calls": "drops the tools|renders what comes before an answer differently",
    "reasoning in two rounds of calls": "drops the tools|renders what comes before an answer differently",
    # After a result the prompt opens no block.
    "reasoning before a call": "drops the reasoning of this answer",
}
# Words beside a call are dropped.
NO_WORDS = dict.fromkeys(
    ("words beside a call/assistant", "words beside a call/completion"), "drops the text beside a tool call"
)

IM_END = Family("<|im_end|>", "<|im_end|>")
HYBRID = IM_END._replace(reasoning="reasoning_content")
SENTENCE = wide("<|end▁of▁sentence|>")
DEEPSEEK = Family(SENTENCE, SENTENCE, closing="\n</think>\n\n", text_arguments=True)
GEMMA4 = Family("<turn|>", "<|tool_response>", reasoning="reasoning")
LLAMA = Family("<|eot_id|>", "<|eot_id|>")
AFTER_A_RESULT = dict.fromkeys(
    [
        *("call", "call of a tool in the system message", "call, then a question/assistant"),
        *("two rounds of calls", "parallel calls", "words beside a call"),
    ],
    "changes the answer or writes its own words into it|renders what comes before an answer differently",
)
OPENED_AFTER_A_RESULT = AFTER_A_RESULT | dict.fromkeys(
    ("reasoning before a call", "reasoning in two rounds of calls/assistant"),
    "renders what comes before an answer differently",
)
ON, OFF = {"enable_thinking": True}, {"enable_thinking": False}

TEMPLATES = {
    "cohere": Template("cohere", Family("<|END_OF_TURN_TOKEN|>"), (Use(1, NO_REASONING | NO_TOOLS),)),
    "cohere2": Template("cohere", Family("<|END_OF_TURN_TOKEN|>"), (Use(1, NO_REASONING | NO_TOOLS),)),
    "deepseek_r1_distill": Template("deepseek", DEEPSEEK, (Use(3, NO_TOOLS),)),
    "deepseekv3": Template("deepseek", DEEPSEEK, (Use(3, DEEPSEEK_TOOLS),)),
    "gemma": Template("gemma", Family("<end_of_turn>"), (Use(1, NO_REASONING | NO_TOOLS | NO_SYSTEM),)),
    "gemma3": Template("gemma", Family("<end_of_turn>"), (Use(1, NO_REASONING | NO_TOOLS),)),
    # Of these only calls are written with their reasoning.
    **dict.fromkeys(
        ("gemma4", "gemma4_v3", "gemma4_v4"),
        Template("gemma4", GEMMA4, (Use(1, NO_REASONING), Use(1, NO_REASONING, ON))),
    ),
    "gemma4_v2": Template(
        "gemma4",
        GEMMA4._replace(call_end="<turn|>"),
        (Use(1, NO_REASONING), Use(1, NO_REASONING, ON)),
    ),
    # The words are moved behind the call's result once that is there, where thinking opens a block.
    "gemma4_v5": Template(
        "gemma4",
        GEMMA4,
        (Use(1), Use(1, {"words beside a call": "renders what comes before an answer differently"}, ON)),
    ),
    # Prompt and text do not agree about what follows a tool's result.
    "diffusion_gemma": Template("gemma4", GEMMA4, (Use(1, AFTER_A_RESULT), Use(1, OPENED_AFTER_A_RESULT, ON))),
    "glm4moe": Template(
        "glm",
        Family("<|user|>", "<|observation|>", appended=True, reasoning="reasoning_content"),
        (Use(1), Use(1, CLOSED, OFF)),
    ),
    "gptoss": Template(
        "gptoss",
        Family("<|return|>", "<|call|>", reasoning="thinking"),
        (
            Use(3, ONE_CALL),
            Use(3, ONE_CALL, {"reasoning_effort": "low"}),
        ),
    ),
    "lfm2": Template("lfm2", IM_END, (Use(1, NO_REASONING | NO_TOOLS),)),
    "lfm2_v2": Template("lfm2", IM_END, (Use(1, NO_REASONING),)),
    "lfm2_2_5": Template("lfm2", IM_END._replace(reasoning="thinking"), (Use(1),)),
    "lfm2_2_5_v2": Template("lfm2", IM_END._replace(reasoning="thinking"), (Use(1),)),
    "lfm2_2_5_vl": Template("lfm2", IM_END._replace(reasoning="thinking"), (Use(1),)),
    "llama3": Template("llama3", LLAMA, (Use(1, NO_REASONING | NO_TOOLS),)),
    "llama3_1": Template("llama3", LLAMA, (Use(1, NO_REASONING | ONE_CALL | NO_WORDS),)),
    "llama3_2": Template("llama3", LLAMA, (Use(1, NO_REASONING | ONE_CALL | NO_WORDS),)),
    "muse_glimmer": Template(
        "muse",
        Family("<|eot|>", "<|eot|>", reasoning="reasoning_content"),
        (Use(1, NO_WORDS), Use(1, NO_WORDS, {"reasoning_strength": "low"})),
    ),
    **dict.fromkeys(
        ("nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "nemotron_3_5_lightning"),
        Template("nemotron", HYBRID, (Use(3), Use(1, CLOSED, OFF))),
    ),
    "phi3": Template("phi", Family("<|end|>"), (Use(1, NO_REASONING | NO_TOOLS),)),
    "phi3_5": Template("phi", Family("<|end|>"), (Use(1, NO_REASONING | NO_TOOLS),)),
    "qwen2_5": Template("qwen", IM_END, (Use(1, NO_REASONING),)),
    "qwen2_5_vl": Template("qwen", IM_END, (Use(1, NO_REASONING | NO_TOOLS),)),
    "qwen3": Template("qwen", HYBRID, (Use(3), Use(3, args=ON), Use(3, CLOSED, OFF))),
    "qwen3_5_think": Template("qwen", HYBRID, (Use(3), Use(3, CLOSED, OFF))),
    "qwen3_5_nothink": Template("qwen", HYBRID, (Use(3, CLOSED), Use(3, args=ON))),
    # With `preserve_thinking` one text would do, but `<think>\n` + `\n</think>` is one token less in it.
    "qwen3_6": Template("qwen", HYBRID, (Use(3), Use(3, CLOSED, OFF), Use(3, args={"preserve_thinking": True}))),
    "qwen3_8": Template(
        "qwen",
        HYBRID,
        (
            Use(3),
            Use(1, CLOSED, OFF),
            Use(3, args={"reasoning_effort": "low"}),
            Use(3, args={"preserve_thinking": False}),
        ),
    ),
    "qwen3_instruct_2507": Template("qwen", IM_END, (Use(1, NO_REASONING),)),
    "qwen3_vl": Template("qwen", IM_END, (Use(1, NO_REASONING),)),
}
