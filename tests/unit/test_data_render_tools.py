"""Tools, calls and results: the template writes all of them, or the row is refused."""

from typing import Any

import pytest

from finetune.data.render import Renderer, read_template
from finetune.data.row_errors import RowError
from finetune.data.types import Conversation, Message
from tests.rendering import CALL_ID, chat, labelled, supervised, tool_call, tool_schema, weather
from tests.support import CHATML as PLAIN
from tests.support import tiny_tokenizer

CHATML = read_template("chatml")
PLAIN_RESULT = "+ message['content'] + '\\n</tool_response>'"
QUOTED_RESULT = "+ (message['content'] | tojson) + '\\n</tool_response>'"
DO = "name a template with tool support in data.chat_template: chatml, mistral-v3 or later"


def renderer(template: str, loss_on: Any = "assistant") -> Renderer:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Renderer(tokenizer, "X", loss_on)


def row_error(template: str, conversation: Conversation, loss_on: Any = "assistant") -> str:
    with pytest.raises(RowError) as caught:
        renderer(template, loss_on).render(conversation)
    return str(caught.value.problem("f", 1))


def without(part: str, template: str = CHATML) -> str:
    assert part in template
    return template.replace(part, "''")


def test_chatml_writes_tools_as_hermes_does() -> None:
    rendering = renderer(CHATML).render(weather())
    system, user, call, result, final = rendering.text.split("<|im_start|>")[1:]
    assert system.startswith("system\n# Tools\n\nYou may call one or more functions")
    assert '<tools>\n{"type": "function", "function": {"name": "get_weather", "description": ' in system
    assert user == "user\nHow is Oslo?<|im_end|>\n"
    arguments = '{"city": "Oslo", "days": 3, "wind": true}'
    assert (
        call == f'assistant\n<tool_call>\n{{"name": "get_weather", "arguments": {arguments}}}\n</tool_call><|im_end|>\n'
    )
    assert result == "user\n<tool_response>\n22 degrees\n</tool_response><|im_end|>\n"
    assert final == "assistant\nIt is warm.<|im_end|>\n"


def test_chatml_puts_a_system_message_before_the_tools_and_two_results_into_one_turn() -> None:
    conversation = weather()
    calls = [tool_call("get_weather", city="Oslo"), tool_call("get_weather", city="Bergen")]
    messages = [
        Message(role="system", content="Be brief."),
        conversation.messages[0],
        Message(role="assistant", content="I look.", tool_calls=calls),
        Message(role="tool", content="cold", tool_call_id=CALL_ID),
        Message(role="tool", content="wet", tool_call_id=CALL_ID),
        conversation.messages[-1],
    ]
    chatml = renderer(CHATML)
    text = chatml.render(Conversation(messages, conversation.tools)).text
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n\n")
    assert "user\n<tool_response>\ncold\n</tool_response>\n<tool_response>\nwet\n</tool_response><|im_end|>\n" in text
    call, final = supervised(tiny_tokenizer(), labelled(chatml, Conversation(messages, conversation.tools)))
    assert call.startswith("I look.\n<tool_call>\n")
    assert call.count("<tool_call>") == 2
    assert final == "It is warm.<|im_end|>"


@pytest.mark.parametrize("content", ["22", '"quoted" \u00e9\n', '{"sky": "gr\u00e5", "t": [1, null]}'])
def test_a_result_may_stand_as_json_or_as_it_is(content: str) -> None:
    assert PLAIN_RESULT in CHATML
    for written in ("message['content']", "(message['content'] | tojson)", "(message['content'] | tojson(True))"):
        template = CHATML.replace(PLAIN_RESULT, f"+ {written} + '\\n</tool_response>'")
        assert renderer(template).render(weather(content)).text


@pytest.mark.parametrize("loss_on", ["assistant", "last_assistant"])
def test_a_template_that_drops_a_part_of_a_call_is_refused(loss_on: str) -> None:
    for part, missing in (("arguments", "city"), ("name", "rain")):
        call = tool_call("rain", city="Oslo")
        messages: list[Any] = [{**m, "tool_calls": [call]} if "tool_calls" in m else m for m in weather().messages]
        dropped = without(f"(call['function']['{part}'] | tojson)")
        assert row_error(dropped, Conversation(messages, weather().tools), loss_on) == (
            f'f:1: messages[1].tool_calls: X drops or changes a tool call; got "{missing}"; {DO}'
        )


def test_what_is_said_beside_a_call_must_stand_in_the_answer() -> None:
    messages: list[Any] = [{**m, "content": "I look."} if "tool_calls" in m else m for m in weather().messages]
    dropped = without("{{- '\\n' + message['content'] -}}\n{%- endif -%}\n{%- for call", CHATML).replace(
        "'' in message['tool_calls']", "{%- endif -%}{%- for call in message['tool_calls']"
    )
    said = row_error(dropped, Conversation(messages, weather().tools))
    assert 'X drops the text beside a tool call; got "I look."' in said


def test_a_result_that_is_written_as_json_is_not_mistaken_for_an_answer_that_says_the_same() -> None:
    assert renderer(CHATML.replace(PLAIN_RESULT, QUOTED_RESULT)).render(weather("\x08", "\x08"))


def test_a_tokenizer_may_have_a_template_of_its_own_for_tools() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": PLAIN, "tool_use": CHATML}
    two = Renderer(tokenizer, "X")
    assert "<tools>" in two.render(weather()).text
    assert two.render(chat("a", "b")).text == renderer(PLAIN).render(chat("a", "b")).text


def test_a_template_that_knows_no_tools_is_refused_where_the_row_has_them() -> None:
    assert renderer(PLAIN).render(chat("a", "b"))
    said = Conversation(chat("a get_weather", "b").messages, weather().tools)
    same = 'f:1: tools: X drops the tools; got "the same text with and without tools"; '
    assert row_error(PLAIN, said) == same + DO
    unsaid = Conversation(chat("a", "b").messages, weather().tools)
    assert row_error(PLAIN, unsaid) == f'f:1: tools: X drops the tools; got "get_weather"; {DO}'
    assert "X drops or changes a tool call" in row_error(PLAIN, weather())


def test_a_template_that_drops_results_is_refused_also_where_another_turn_says_the_same() -> None:
    dropped = CHATML.replace("+ message['content'] + '\\n</tool_response>'", "+ '\\n</tool_response>'")
    assert dropped != CHATML
    expected = f'f:1: messages[2]: X drops or changes the content of the tool message; got "It is warm."; {DO}'
    assert row_error(dropped, weather("It is warm.", "It is warm. Enjoy!")) == expected


@pytest.mark.parametrize("name", ["alpaca", "mistral"])
def test_templates_without_tools_say_so(name: str) -> None:
    template = read_template(name)
    assert "refuses the conversation; got there are no tools in this format" in row_error(template, weather())
    bare = Conversation(weather().messages)
    assert "refuses the conversation; got" in row_error(template, bare)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tool_call_id": "call_1"}, "a tool result needs the tool_call_id of its call: 9 letters or digits"),
        ({"role": "user"}, "roles must alternate user/assistant/user/assistant/..., after a system message if any; to"),
    ],
)
def test_mistral_v3_names_what_it_cannot_write(change: dict[str, Any], message: str) -> None:
    messages: list[Any] = [{**m, **change} if m["role"] == "tool" else m for m in weather().messages]
    said = row_error(read_template("mistral-v3"), Conversation(messages))
    assert f"X refuses the conversation; got {message}" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tool_calls": [tool_call("f", "call_1234567")]}, "the id of a tool call must be 9 letters or digits"),
        ({"content": "I look."}, "a turn has either content or tool calls"),
    ],
)
@pytest.mark.parametrize("name", ["mistral-v3", "mistral-v3-tekken"])
def test_mistral_v3_names_what_it_cannot_write_of_a_call(name: str, change: dict[str, Any], message: str) -> None:
    messages: list[Any] = [{**m, **change} if "tool_calls" in m else m for m in weather().messages]
    assert f"X refuses the conversation; got {message}" in row_error(read_template(name), Conversation(messages))


@pytest.mark.parametrize("place", ["arguments", "name", "tools", "result id"])
def test_a_control_token_anywhere_in_a_call_or_a_schema_is_refused(place: str) -> None:
    conversation = weather()
    call, tools = tool_call("get_weather", city="Oslo"), [tool_schema("get_weather")]
    messages: list[Any] = [{**m, "tool_calls": [call]} if "tool_calls" in m else {**m} for m in conversation.messages]
    if place == "arguments":
        call["function"]["arguments"] = {"a": [{"b": "x<|im_end|>"}]}
    elif place == "name":
        call["function"]["name"] = "x<|im_end|>"
    elif place == "tools":
        tools[0]["function"]["description"] = "x<|im_end|>"
    else:
        messages[2]["tool_call_id"] = "<|im_end|>"
    message = row_error(CHATML, Conversation(messages, tools))
    assert "the control token <|im_end|>, which would be read as the conversation's frame" in message


def test_a_call_that_ends_with_another_token_than_the_eos_is_refused() -> None:
    """The next EOS would be that of the result, which the template's frame ("assistant") seems to say once more."""
    call_end = "'}\\n</tool_call>' -}}\n{%- endfor -%}\n{{- '<|im_end|>\\n' -}}"
    assert call_end in CHATML
    template = CHATML.replace(call_end, call_end.replace("<|im_end|>", "<|call_end|>"))
    assert "X does not end an answer with the EOS token <|im_end|>" in row_error(template, weather("a"))
