"""The shipped Mistral templates give, token for token, what Mistral's own library gives."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from transformers import PreTrainedTokenizerFast

from finetune.data.render import Renderer
from finetune.data.row_errors import RowError
from finetune.data.tokenizer import check_split_tokens, load_tokenizer
from finetune.data.types import Conversation, Message, TokenizedText
from finetune.errors import DataError
from tests.real_tokenizers import (
    SENTENCEPIECE,
    TEKKEN,
    TEMPLATES,
    mistral_renderer,
    mistral_tokenizer,
    oracle,
    tekken_file,
)
from tests.rendering import chat, labelled, supervised, tool_call, tool_schema, weather

VERSIONS = [*SENTENCEPIECE, *TEKKEN]
WITH_TOOLS = [version for version in VERSIONS if version not in ("v1", "v2")]
FROM_V7 = [version for version in WITH_TOOLS if version not in ("v3", "tekken")]
every_version = pytest.mark.parametrize("version", VERSIONS)
with_tools = pytest.mark.parametrize("version", WITH_TOOLS)
from_v7 = pytest.mark.parametrize("version", FROM_V7)
with_reasoning = pytest.mark.parametrize("version", ["v13", "v15"])
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


def openai(conversation: Conversation) -> list[dict[str, Any]]:
    """The messages as Mistral's library and the templates take them."""
    messages: list[Any] = [{k: v for k, v in message.items() if k != "name" and v} for message in conversation.messages]
    for message in messages:
        if "reasoning" in message:
            message["reasoning_content"] = message.pop("reasoning")
    return messages


def mistral_ids(version: str, conversation: Conversation, **settings: Any) -> list[int]:
    """What `mistral_common` makes of a conversation that ends with an answer."""
    request = ChatCompletionRequest.from_openai(openai(conversation), tools=conversation.tools, **settings)
    ids: list[int] = oracle(version).encode_chat_completion(request).tokens
    return ids


def template_ids(version: str, conversation: Conversation, **variables: Any) -> list[int]:
    """What the shipped template makes of it."""
    tokenizer = mistral_tokenizer(version)
    given = {"tools": conversation.tools, **variables}
    ids: list[int] = tokenizer.apply_chat_template(openai(conversation), **given)["input_ids"]
    return ids


@every_version
def test_the_tokenizers_that_the_tests_build_are_mistrals_own(version: str) -> None:
    space = " " * (version in SENTENCEPIECE)  # SentencePiece's own; transformers adds it at a text's beginning only
    for text in TEXTS:
        own = oracle(version).instruct_tokenizer.tokenizer.encode(text, bos=False, eos=False)
        assert mistral_tokenizer(version)("</s>" + space + text, add_special_tokens=False)["input_ids"][1:] == own


@every_version
@pytest.mark.parametrize("turns", [1, 3])
def test_a_conversation_has_mistrals_ids(version: str, turns: int) -> None:
    for text in TEXTS:
        conversation = chat(*[text, "Well: " + text] * turns)
        assert template_ids(version, conversation) == mistral_ids(version, conversation)


@every_version
@pytest.mark.parametrize("turns", [1, 3])
def test_a_system_message_has_mistrals_ids(version: str, turns: int) -> None:
    conversation = chat(*["Hi", "Hello"] * turns, system="Be brief.")
    if version == "v1":  # no system role: merged by data.system, as Mistral's library does of itself
        merging = mistral_renderer(version, system="merge_into_first_user")
        assert labelled(merging, conversation).input_ids.tolist() == mistral_ids(version, conversation)
    else:
        assert template_ids(version, conversation) == mistral_ids(version, conversation)


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


@with_tools
def test_a_tool_its_call_and_the_result_have_mistrals_ids(version: str) -> None:
    for conversation in map(weather, RESULTS):
        assert template_ids(version, conversation) == mistral_ids(version, conversation)


def two_calls(results: tuple[str, ...] = ("aaaaaaaaa", "bbbbbbbbb"), text: str = "") -> Conversation:
    """Two calls at once, and a question after their results."""
    calls = [tool_call("get_weather", "aaaaaaaaa", city="Oslo"), tool_call("get_weather", "bbbbbbbbb", city="\u00c5s")]
    messages = [
        Message(role="system", content="Use the tools."),
        Message(role="user", content="Oslo and \u00c5s?"),
        Message(role="assistant", content=text, tool_calls=calls),
        *(Message(role="tool", content=f"cold: {call[0]}", tool_call_id=call) for call in results),
        Message(role="assistant", content="Both cold: b, cold: a."),
        Message(role="user", content="Thanks"),
        Message(role="assistant", content="Welcome."),
    ]
    return Conversation(messages, [tool_schema("get_weather")])


@with_tools
def test_two_calls_at_once_and_a_question_after_them_have_mistrals_ids(version: str) -> None:
    assert template_ids(version, two_calls()) == mistral_ids(version, two_calls())


@from_v7
def test_text_before_a_call_has_mistrals_ids(version: str) -> None:
    conversation = two_calls(text="I look it up. ")
    assert template_ids(version, conversation) == mistral_ids(version, conversation)


@with_tools
def test_results_in_another_order_than_the_calls_have_mistrals_ids(version: str) -> None:
    conversation = two_calls(("bbbbbbbbb", "aaaaaaaaa"))
    assert template_ids(version, conversation) == mistral_ids(version, conversation)


@pytest.mark.parametrize(
    "function",
    [
        {"parameters": {"type": "object", "properties": {}}, "strict": True, "name": "get_weather", "returns": "text"},
        {"name": "get_weather", "description": None, "parameters": None},
        {"description": "\u00c5s & <b>", "name": "get_weather", "parameters": {"required": [], "type": "object"}},
    ],
)
@with_tools
def test_a_tool_is_described_as_mistral_describes_it(version: str, function: dict[str, Any]) -> None:
    conversation = Conversation(weather().messages, [{"function": function, "type": "function"}])
    assert template_ids(version, conversation) == mistral_ids(version, conversation)


def reasoned(conversation: Conversation) -> Conversation:
    """The same, with reasoning before every answer and every call."""
    messages = [
        Message(**message, reasoning=f"Turn {i}:\n\nso.") if message["role"] == "assistant" else message
        for i, message in enumerate(conversation.messages)
    ]
    return Conversation(messages, conversation.tools)


@pytest.mark.parametrize("conversation", [chat("Hi", " Hello  ", "And?", "Nothing."), two_calls(), chat("Hi", "")])
@with_reasoning
def test_reasoning_has_mistrals_ids(version: str, conversation: Conversation) -> None:
    assert template_ids(version, reasoned(conversation)) == mistral_ids(version, reasoned(conversation))


@pytest.mark.parametrize("variables", [{}, {"reasoning_effort": "none"}, {"reasoning_effort": "high"}])
@pytest.mark.parametrize("conversation", [chat("Hi", "Hello", "And?", "Nothing."), two_calls()])
def test_the_reasoning_effort_has_mistrals_ids(conversation: Conversation, variables: dict[str, str]) -> None:
    ids = template_ids("v15", reasoned(conversation), **variables)
    assert ids == mistral_ids("v15", reasoned(conversation), **variables)


def test_another_reasoning_effort_is_refused_as_mistral_refuses_it() -> None:
    with pytest.raises(MistralCommonException, match="reasoning_effort should be one of"):
        mistral_ids("v15", chat("Hi", "Hello"), reasoning_effort="low")
    with pytest.raises(TemplateError, match="reasoning_effort must be none or high, not low"):
        template_ids("v15", chat("Hi", "Hello"), reasoning_effort="low")


def check_examples(version: str, conversation: Conversation, expected: list[list[str]], **settings: Any) -> None:
    """The supervised texts of each example, which has the ids that Mistral gives the conversation up to its end."""
    renderer = Renderer(mistral_tokenizer(version), "the template", **settings)
    examples = renderer.examples(conversation)
    for example, tokens in zip(examples, renderer.tokenise(examples), strict=True):
        assert isinstance(tokens, TokenizedText)
        until = Conversation(conversation.messages[: example.answers[-1].message + 1], conversation.tools)
        assert tokens.input_ids.tolist() == mistral_ids(version, until)
        assert supervised(mistral_tokenizer(version), tokens) == expected.pop(0)
    assert not expected


@with_tools
def test_answers_after_a_system_message_are_supervised(version: str) -> None:
    answers = ["Hello</s>", "Fine</s>", "Bye</s>"]
    moved = version in ("v3", "tekken")  # the system message is in the last question
    expected = [[answer] for answer in answers] if moved else [answers]
    check_examples(version, chat("Hi", "Hello", "So?", "Fine", "Bye", "Bye", system="Be brief."), expected)


def calls_of(version: str) -> str:
    """What the model writes for `two_calls`."""
    oslo, as_ = '{"city": "Oslo"}', '{"city": "\u00c5s"}'
    if version in ("v13", "v15"):
        return f"[TOOL_CALLS]get_weather[ARGS]{oslo}[TOOL_CALLS]get_weather[ARGS]{as_}</s>"
    if version == "v11":
        named = "[TOOL_CALLS]get_weather[CALL_ID]"
        return f"{named}aaaaaaaaa[ARGS]{oslo}{named}bbbbbbbbb[ARGS]{as_}</s>"
    name, space = '{"name": "get_weather", "arguments": ', " " * (version in SENTENCEPIECE)
    return f'[TOOL_CALLS]{space}[{name}{oslo}, "id": "aaaaaaaaa"}}, {name}{as_}, "id": "bbbbbbbbb"}}]</s>'


@pytest.mark.parametrize("results", [("aaaaaaaaa", "bbbbbbbbb"), ("bbbbbbbbb", "aaaaaaaaa")])
@with_tools
def test_calls_and_answers_are_supervised(version: str, results: tuple[str, str]) -> None:
    first, last = [calls_of(version), "Both cold: b, cold: a.</s>"], ["Welcome.</s>"]
    together = version in ("v13", "v15")  # others move the tools to the last question
    check_examples(version, two_calls(results), [first + last] if together else [first, last])


@from_v7
def test_text_before_calls_is_supervised(version: str) -> None:
    conversation = two_calls(text="I look it up. ")
    asked = Conversation(conversation.messages[:3], conversation.tools)
    check_examples(version, asked, [["I look it up." + calls_of(version)]])


@with_reasoning
def test_reasoning_is_supervised_by_choice(version: str) -> None:
    thought = [f"[THINK]Turn {i}:\n\nso.[/THINK]" for i in (2, 5, 7)]
    texts = [calls_of(version), "Both cold: b, cold: a.</s>", "Welcome.</s>"]
    check_examples(version, reasoned(two_calls()), [[mark + text for mark, text in zip(thought, texts, strict=True)]])
    without = [part for text in texts for part in ("[THINK]", "[/THINK]" + text)]
    check_examples(version, reasoned(two_calls()), [without], train_on_reasoning=False)


@with_reasoning
def test_a_think_block_in_the_content_is_reasoning(version: str) -> None:
    renderer = mistral_renderer(version)
    [inline] = renderer.examples(chat("Hi", "<think>\nSo.\n</think>\n\nHello"))
    assert inline.text.endswith("[/INST][THINK]So.[/THINK]Hello</s>")


@pytest.mark.parametrize("version", [version for version in VERSIONS if version not in ("v13", "v15")])
def test_reasoning_is_refused_where_mistral_has_no_mark_for_it(version: str) -> None:
    with pytest.raises(RowError, match="drops the reasoning of this answer"):
        mistral_renderer(version).examples(reasoned(chat("Hi", "Hello")))


ROLES = "roles must alternate user/assistant/user/assistant/..., after a system message if any; "
NINE = "a tool result needs the tool_call_id of its call: 9 letters or digits"


@pytest.mark.parametrize(
    ("versions", "conversation", "message"),
    [
        (WITH_TOOLS, chat("Hi", ""), "an answer has content, reasoning or tool calls|an answer has content or tool"),
        (FROM_V7, two_calls(("aaaaaaaaa",)), ROLES + "each tool call has one result"),
        (["v11", "v13", "v15"], two_calls(("aaaaaaaaa", "aaaaaaaaa")), "each tool call needs one result with its id"),
        (["v13", "v15"], two_calls(("aaaaaaaaa", "ccccccccc")), "each tool call needs one result with its id"),
        (["v7", "v7-tekken", "v11"], two_calls(("aaaaaaaaa", "b")), NINE),
    ],
)
def test_what_mistral_refuses_is_refused(versions: list[str], conversation: Conversation, message: str) -> None:
    for version in versions:
        with pytest.raises((MistralCommonException, ValueError)):
            mistral_ids(version, conversation)
        with pytest.raises(TemplateError, match=message):
            template_ids(version, conversation)


@pytest.mark.parametrize(
    ("version", "template", "missing"),
    [
        ("v1", "mistral-v3", "[AVAILABLE_TOOLS] in "),
        ("v3", "mistral-v7", "[SYSTEM_PROMPT] in "),
        ("v7", "mistral-v11", "[CALL_ID] in "),
        ("v7", "mistral-v13", "[THINK] in "),
    ],
)
def test_a_template_of_another_version_is_refused(version: str, template: str, missing: str, tmp_path: Path) -> None:
    mistral_tokenizer(version).save_pretrained(tmp_path)
    with pytest.raises(DataError) as caught:
        load_tokenizer(str(tmp_path), None, template)
    what = f"{template} writes special tokens that this vocabulary lacks and would split into pieces"
    assert str(caught.value).startswith(f"data.chat_template: {what}; got {missing}")
    assert str(caught.value).endswith(", or name another template")


@every_version
def test_the_template_of_a_version_fits_its_tokenizer(version: str) -> None:
    check_split_tokens(mistral_tokenizer(version), TEMPLATES.get(version, f"mistral-{version}"), [])


CONFIG = {"model_type": "mistral3", "transformers_version": "4.50.0"}


@pytest.mark.parametrize("beside", [True, False], ids=["beside tokenizer.json", "alone"])
def test_a_checkpoint_with_tekken_json_is_loaded(beside: bool, tmp_path: Path) -> None:
    if beside:
        mistral_tokenizer("v13").save_pretrained(tmp_path)
    shutil.copy(tekken_file("v13"), tmp_path / "tekken.json")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    loaded = load_tokenizer(str(tmp_path), None, "mistral-v13")
    named = [loaded.bos_token, loaded.eos_token, loaded.pad_token, loaded.unk_token]
    assert named == ["<s>", "</s>", "<pad>", "<unk>"]
    ids: list[int] = loaded.apply_chat_template(openai(chat("Hi", "Hello")))["input_ids"]
    assert ids == mistral_ids("v13", chat("Hi", "Hello"))


def test_a_tokenizer_published_with_another_expression_than_mistrals_has_mistrals_ids(tmp_path: Path) -> None:
    """transformers only warns, and only of vocabularies with more than 100,000 tokens."""
    mistral_tokenizer("v13").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    file = tmp_path / "tokenizer.json"
    state = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"unused {number}": number for number in range(len(vocabulary) + 1000, 110_000)}
    state["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
    file.write_text(json.dumps(state), encoding="utf-8")
    published = PreTrainedTokenizerFast(tokenizer_file=str(file))
    loaded = load_tokenizer(str(tmp_path), None, "mistral-v13")
    text = "Don't   STOP camelCaseWords\n\n\n/x"
    assert published(text)["input_ids"] != mistral_tokenizer("v13")(text)["input_ids"]
    assert loaded(text)["input_ids"] == mistral_tokenizer("v13")(text)["input_ids"]
    loaded.save_pretrained(tmp_path / "adapter")
    again = load_tokenizer(str(tmp_path / "adapter"), None, None)
    assert again(text)["input_ids"] == loaded(text)["input_ids"]
