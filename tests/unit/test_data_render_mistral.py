"""The shipped Mistral templates give, token for token, what Mistral's own library gives."""

from typing import Any

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest

from finetune.data.types import Conversation, Message
from tests.real_tokenizers import mistral_renderer, mistral_tokenizer, oracle
from tests.rendering import CALL_ID, chat, labelled, supervised, tool_call, tool_schema, weather

every_version = pytest.mark.parametrize("version", ["v1", "v3", "tekken"])
with_tools = pytest.mark.parametrize("version", ["v3", "tekken"])
TEXTS = [
    "Hello, how are you?",
    "   three spaces, a tab\t, and two at the end  ",
    "one\r\ntwo\n\n\nthree",
    "\U0001f469\u200d\U0001f467 \U0001f1f3\U0001f1f4 e\u0301",
    "\u05e9\u05dc\u05d5\u05dd\u200f \u0645\u0631\u062d\u0628\u0627",
    "nul \x00 and \x1b and \ufffd and \ue000",
    "def f(x):\n    return x ** 2  # 12345678",
    "<|im_start|> [INST is not a token",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002" * 3,
    "x" * 300,
]


def mistral_ids(version: str, conversation: Conversation) -> list[int]:
    """What `mistral_common` makes of a conversation that ends with an answer."""
    messages: list[Any] = [{k: v for k, v in message.items() if k != "name" and v} for message in conversation.messages]
    request = ChatCompletionRequest.from_openai(messages=messages, tools=conversation.tools)
    ids: list[int] = oracle(version).encode_chat_completion(request).tokens
    return ids


@every_version
@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizers_that_the_tests_build_are_mistrals_own(version: str, text: str) -> None:
    own = oracle(version).instruct_tokenizer.tokenizer.encode(text, bos=False, eos=False)
    space = "" if version == "tekken" else " "  # SentencePiece's own; transformers adds it at a text's beginning only
    assert mistral_tokenizer(version)("</s>" + space + text, add_special_tokens=False)["input_ids"][1:] == own


@every_version
@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("text", TEXTS)
def test_a_conversation_has_mistrals_ids(version: str, text: str, turns: int) -> None:
    conversation = chat(*[text, "Well: " + text] * turns)
    assert labelled(mistral_renderer(version), conversation).input_ids.tolist() == mistral_ids(version, conversation)


@every_version
def test_a_merged_system_message_has_mistrals_ids(version: str) -> None:
    merging = mistral_renderer(version, system="merge_into_first_user")
    conversation = chat("Hi", "Hello", system="Be brief.")
    assert labelled(merging, conversation).input_ids.tolist() == mistral_ids(version, conversation)


RESULTS = [
    "22 degrees",
    '{"degrees": 22, "sky": "clear"}',
    "[1, 2]",
    "22",
    "-2.5",
    "true",
    "null",
    'say "hi"',
    "nan",
    "1_0",
    "{x",
]


@pytest.mark.parametrize("result", RESULTS)
@with_tools
def test_tools_calls_and_results_have_mistrals_ids(version: str, result: str) -> None:
    conversation = weather(result)
    rendered = labelled(mistral_renderer(version), conversation)
    assert rendered.input_ids.tolist() == mistral_ids(version, conversation)
    call, final = supervised(mistral_tokenizer(version), rendered)
    space = " " if version == "v3" else ""
    arguments = '{"city": "Oslo", "days": 3, "wind": true}'
    assert call == f'[TOOL_CALLS]{space}[{{"name": "get_weather", "arguments": {arguments}, "id": "{CALL_ID}"}}]</s>'
    assert final == "It is warm.</s>"


@with_tools
def test_two_calls_at_once_and_a_question_after_them_have_mistrals_ids(version: str) -> None:
    calls = [tool_call("get_weather", "aaaaaaaaa", city="Oslo"), tool_call("get_weather", "bbbbbbbbb", city="Bergen")]
    messages = [
        Message(role="user", content="Oslo and Bergen?"),
        Message(role="assistant", content="", tool_calls=calls),
        Message(role="tool", content="cold", tool_call_id="aaaaaaaaa"),
        Message(role="tool", content="wet", tool_call_id="bbbbbbbbb"),
        Message(role="assistant", content="Cold and wet."),
        Message(role="user", content="Thanks"),
        Message(role="assistant", content="Welcome."),
    ]
    conversation = Conversation(messages, [tool_schema("get_weather")])
    completion = mistral_renderer(version, loss_on="completion")
    rendered = labelled(completion, conversation)
    assert rendered.input_ids.tolist() == mistral_ids(version, conversation)
    assert supervised(mistral_tokenizer(version), rendered) == ["Welcome.</s>"]
    # Mistral moves the tools to the last question: the first answers are learned with the tools before their own.
    examples = mistral_renderer(version).examples(conversation)
    first, last = ([answer.message for answer in example.answers] for example in examples)
    assert sorted(first + last) == [1, 4, 6]
    assert last == [6]
