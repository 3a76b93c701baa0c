"""Tools and their calls: OpenAI's shape whatever the file's, and the order of calls and results."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from finetune.data.types import Conversation, Function, Message
from tests.row_formats import assistant, convert, refusal, talk, user

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "f", "description": "d", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
USER, ANSWER = user("hi"), assistant("done")
RESULT: dict[str, Any] = {"role": "tool", "content": "{}"}


def call(arguments: object = '{"city": "Oslo"}', **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "arguments": arguments}, **more}


def calling(*calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **more}


def tools(row_format: str, row: Mapping[str, Any]) -> object:
    example = convert(row_format, row)
    assert isinstance(example, Conversation)
    return example.tools


@pytest.mark.parametrize("given", [[TOOL], [FUNCTION], json.dumps([TOOL]), json.dumps([FUNCTION])])
def test_tools_are_a_list_or_its_json_text_and_bare_functions_are_wrapped(given: object) -> None:
    assert tools("messages", {"messages": [USER, ANSWER], "tools": given}) == [TOOL]
    assert tools("sharegpt", {"conversations": [USER, ANSWER], "tools": given}) == [TOOL]


def test_arguments_are_parsed_whether_they_are_an_object_or_its_json_text() -> None:
    row = {"messages": [USER, calling(call(id="a"), call({"city": "Oslo"}))]}
    expected = {"type": "function", "function": {"name": "f", "arguments": {"city": "Oslo"}}}
    last = {"role": "assistant", "content": "", "tool_calls": [{**expected, "id": "a"}, expected]}
    assert talk("messages", row)[-1] == last


@pytest.mark.parametrize("nothing", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_only_beside_tool_calls_may_the_content_be_missing_null_or_empty(nothing: dict[str, Any]) -> None:
    message = {"role": "assistant", "tool_calls": [call()], **nothing}
    assert talk("messages", {"messages": [USER, message]})[-1]["content"] == ""
    del message["tool_calls"]
    assert refusal("messages", {"messages": [USER, message]}).startswith("messages[1].content: ")


def test_words_beside_a_call_are_kept() -> None:
    for words in (" wait", " \n"):
        assert talk("messages", {"messages": [USER, calling(call(), content=words)]})[-1]["content"] == words


@pytest.mark.parametrize("word", ["function_call", "tool_call"])
def test_the_function_calls_of_sharegpt_become_tool_calls(word: str) -> None:
    one = Function(name="f", arguments={"city": "Oslo"})
    for value, count in ((json.dumps(one), 1), (json.dumps([one, one]), 2)):
        turns = [
            {"from": "human", "value": "hi"},
            {"from": word, "value": value},
            {"from": "observation", "value": "9"},
        ]
        messages = talk("sharegpt", {"conversations": [*turns, {"from": "gpt", "value": "done"}]})
        assert messages[1] == Message(
            role="assistant", content="", tool_calls=[{"type": "function", "function": one}] * count
        )
        assert messages[2:] == [Message(role="tool", content="9"), ANSWER]


@pytest.mark.parametrize(
    "messages",
    [
        [USER, calling(call())],
        [USER, calling(call()), RESULT, ANSWER],
        [USER, calling(call(id="a")), RESULT, ANSWER],
        [USER, calling(call()), {**RESULT, "tool_call_id": "a"}, ANSWER],
        [USER, calling(call(), call()), RESULT, RESULT, ANSWER],
        [USER, calling(call(), call()), RESULT, ANSWER],
        [USER, calling(call()), RESULT, calling(call()), RESULT, ANSWER, USER, ANSWER],
        [
            USER,
            calling(call(id="a"), call(id="b")),
            {**RESULT, "tool_call_id": "b"},
            {**RESULT, "tool_call_id": "a"},
            ANSWER,
        ],
        [USER, assistant("<tool_call>{}</tool_call>"), RESULT, ANSWER],
    ],
)
def test_results_follow_their_calls_and_the_assistant_follows_them(messages: list[dict[str, Any]]) -> None:
    assert [message["role"] for message in talk("messages", {"messages": messages})] == [m["role"] for m in messages]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([RESULT], "messages[0].role: a tool result without a call before it; got "),
        ([USER, RESULT], "messages[1].role: a tool result without a call before it; got "),
        ([USER, ANSWER, RESULT, ANSWER], "messages[2].role: a tool result without a call before it; got "),
        ([USER, calling(call()), RESULT, RESULT], "messages[3].role: a tool result without a call before it; got "),
        ([USER, calling(call()), USER, ANSWER], "messages[2].role: a tool was called, and the user speaks before the"),
        ([USER, calling(call()), RESULT, USER, ANSWER], "messages[3].role: a tool was called, and the user speaks"),
        ([USER, calling(call()), ANSWER], "messages[2].role: two assistant messages in a row; got "),
        ([USER, calling(call()), RESULT], "messages[2].role: the last message is not the assistant's; got "),
        (
            [USER, calling(call(id="a")), {**RESULT, "tool_call_id": "b"}, ANSWER],
            "messages[2].tool_call_id: answers no open call; got 'b'; open: ['a']; give each result the id of one call",
        ),
        ([{**USER, "tool_calls": [call()]}], 'messages[0].tool_calls: only the assistant calls tools; got "user"'),
        ([USER, {**ANSWER, "tool_call_id": "a"}], "messages[1].tool_call_id: only a tool's message has a tool_call_id"),
        ([USER, calling(call()), {**RESULT, "content": ""}], 'messages[2].content: is empty; got ""'),
        ([USER, {**ANSWER, "tool_calls": "f"}], 'messages[1].tool_calls: must be a list of calls; got "f"; write {typ'),
        ([USER, calling({"name": "f"})], "messages[1].tool_calls[0].arguments: is missing; got "),
        ([USER, calling({"type": "function"})], "messages[1].tool_calls[0]: must be an object with function; got "),
        ([USER, calling(call(type="code"))], 'messages[1].tool_calls[0].type: only functions can be called; got "code'),
        ([USER, calling(call(x=1))], "messages[1].tool_calls[0].x: is not supported and must not be ignored; got 1"),
        ([USER, calling(call(id=3))], "messages[1].tool_calls[0].id: must be text; got 3"),
        ([USER, calling(call(None))], "messages[1].tool_calls[0].function.arguments: is missing; got "),
        ([USER, calling(call("{"))], "messages[1].tool_calls[0].function.arguments: not valid JSON (Expecting prop"),
        ([USER, calling(call("[]"))], "messages[1].tool_calls[0].function.arguments: must be an object; got []; write"),
        (
            [USER, calling(call('{"a": 1, "a": 2}'))],
            "messages[1].tool_calls[0].function.arguments: not valid JSON (a key occurs twice in one object)",
        ),
        (
            [USER, calling(call('{"a": NaN}'))],
            "messages[1].tool_calls[0].function.arguments: not valid JSON (NaN is not a JSON number)",
        ),
        (
            [USER, calling(call({"a": float("inf")}))],
            "messages[1].tool_calls[0].function.arguments: cannot be written as JSON (Out of range float",
        ),
        (
            [USER, calling(call({"a": b"bytes"}))],
            "messages[1].tool_calls[0].function.arguments: cannot be written as JSON (Object of type bytes",
        ),
        (
            [USER, calling(call({"a": "\ud83d"}))],
            "messages[1].tool_calls[0].function.arguments: half of a surrogate pair; got ",
        ),
    ],
)
def test_wrong_calls_are_named(messages: list[dict[str, Any]], message: str) -> None:
    assert refusal("messages", {"messages": messages}).startswith(message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "tools: must be a list of tools; got 3; write {type: function, function: {name, description, param"),
        ("[", "tools: not valid JSON (Expecting value"),
        ("[" * 100_000, "tools: not valid JSON (maximum recursion depth"),
        (["f"], 'tools[0]: must be an object; got "f"; write {type: function, '),
        ([{"type": "function", "function": "f"}], 'tools[0].function: must be an object; got "f"'),
        ([{"type": "web", "function": FUNCTION}], 'tools[0].type: only functions can be called; got "web"'),
        ([{"parameters": {}}], 'tools[0].name: is missing; got ["parameters"]; write '),
        (
            [{"name": "f", "parameters": {"properties": {"city": None}}}],
            "tools[0].parameters.properties.city: is null, which is not a schema; write tools as JSON text",
        ),
        ([{"function": {"name": 3}}], "tools[0].function.name: must be text; got 3; write a string"),
    ],
)
def test_wrong_tools_are_named(given: object, message: str) -> None:
    assert refusal("messages", {"messages": [USER, ANSWER], "tools": given}).startswith(message)


def test_a_null_argument_that_the_tool_lacks_comes_from_arrow_and_not_from_the_model() -> None:
    row = {"messages": [USER, calling(call({"city": None}), call({"city": "Oslo", "x": None}))]}
    assert talk("messages", row) == talk("messages", {**row, "tools": [{**FUNCTION, "name": "other"}]})
    assert refusal("messages", {**row, "tools": [TOOL]}) == (
        "messages[1].tool_calls[1].function.arguments.x: is null, and the tool has no such argument; write "
        "arguments as JSON text: columns of objects give each call the keys of all"
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("f(x)", "conversations[1].value: not valid JSON (Expecting value: line 1 column 1 (char 0)); got "),
        (
            "[]",
            'conversations[1].value: is not a tool call; got "[]"; write {name, arguments} as JSON text, or '
            "a list of them",
        ),
        ('{"name": "f"}', "conversations[1].value.arguments: is missing; got "),
        (
            '{"name": "f", "arguments": {}, "x": 1}',
            "conversations[1].value.x: is not supported and must not be ignored",
        ),
        (None, "conversations[1].value: must be text; got null; write a string"),
    ],
)
def test_wrong_function_calls_of_sharegpt_are_named(value: object, message: str) -> None:
    row = {"conversations": [{"from": "human", "value": "hi"}, {"from": "function_call", "value": value}]}
    assert refusal("sharegpt", row).startswith(message)
