"""Arguments of tool calls: in the form that the template takes, and JSON where they stand as an object."""

import re
from pathlib import Path
from typing import Any

import pytest
import trl

from finetune.data.render import ChatTemplate, Renderer, read_template
from finetune.data.render.call_arguments import python_in
from finetune.data.row_errors import RowError
from finetune.data.types import Conversation
from tests.rendering import labelled, supervised, tool_call, tool_schema, weather
from tests.support import tiny_tokenizer

CHATML = read_template("chatml")
WRITTEN = "(call['function']['arguments'] | tojson)"
TRL = Path(trl.__file__).parent / "chat_templates"
ARGUMENTS: dict[str, Any] = {"city": 'Z\u00fcrich "old"', "deep": True, "days": [1, None], "near": {"sea": False}}


def renderer(template: str) -> Renderer:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Renderer(tokenizer, "X")


def calling(**arguments: Any) -> Conversation:
    messages: list[Any] = [dict(message) for message in weather().messages]
    messages[1]["tool_calls"] = [tool_call("get_weather", **arguments)]
    return Conversation(messages, [tool_schema("get_weather")])


def writing(arguments: str) -> str:
    assert WRITTEN in CHATML
    return CHATML.replace(WRITTEN, arguments)


@pytest.mark.parametrize("written", ["call['function']['arguments']", "(call['function']['arguments'] | string)"])
def test_a_template_that_prints_or_joins_the_arguments_gets_them_as_json_text(written: str) -> None:
    own = renderer(writing(written))
    text = own.render(calling(**ARGUMENTS)).text
    assert text == renderer(CHATML).render(calling(**ARGUMENTS)).text
    call, _ = supervised(tiny_tokenizer(), labelled(own, calling(**ARGUMENTS)))
    assert '{"city": "Z\u00fcrich \\"old\\"", "deep": true, "days": [1, null], "near": {"sea": false}}' in call


DEEP = "'{' ~ ('' if call.function.arguments is string else '\"deep\": ' ~ call.function.arguments.deep) ~ '}'"
BY_KEY = "('' ~ (call.function.arguments.items() | list)[0][0] ~ ': ' ~ (call.function.arguments.items() | list)[0][1])"


@pytest.mark.parametrize(
    ("written", "arguments", "python"),
    [
        (DEEP, {"deep": True}, '"deep": True'),
        (DEEP, {"deep": None}, '"deep": None'),
        (BY_KEY, {"near": {"sea": "north"}}, "{'sea': 'north'}"),
        (BY_KEY, {"days": [1, None]}, "[1, None]"),
        (BY_KEY + " | replace(', ', ',')", {"days": [True, 1]}, "[True, 1]"),
    ],
)
def test_arguments_that_stand_as_python_are_refused(written: str, arguments: dict[str, Any], python: str) -> None:
    with pytest.raises(RowError) as caught:
        renderer(writing(written)).render(calling(**arguments))
    assert re.fullmatch(
        re.escape("f:1: messages[1].tool_calls: X writes the arguments of a call as Python, not as JSON; got ")
        + ".*; name a template with tool support in data.chat_template: chatml, mistral-v3 or later",
        str(caught.value.problem("f", 1)),
    )
    assert python.replace('"', '\\"') in str(caught.value.problem("f", 1))


def test_a_template_whose_calls_are_python_or_single_parameters_is_left_to_its_ways() -> None:
    calls = "(call.function.name ~ '(deep=' ~ call.function.arguments.deep ~ ')')"
    parameters = "('<parameter=deep>' ~ call.function.arguments.deep ~ '</parameter>')"
    for written in (calls, parameters):
        assert "True" in renderer(writing(written)).render(calling(deep=True)).text


AS_TEXT = {"deepseekv3.jinja"}
JSON = "deepseekv3 gptoss llama3_1 llama3_2 qwen2_5 qwen3 qwen3_instruct_2507 qwen3_vl"


def test_trls_templates_get_the_form_that_they_take() -> None:
    forms, whole = {}, set()
    for path in sorted(TRL.glob("*.jinja")):
        if path.stem.endswith("_training"):
            continue
        tokenizer = tiny_tokenizer()
        tokenizer.bos_token, tokenizer.chat_template = "<|endoftext|>", path.read_text()
        chat = ChatTemplate(tokenizer, path.stem)
        forms[path.name] = chat.arguments_form
        try:
            text = chat.text(calling(**ARGUMENTS).messages[:2], calling().tools)
        except RowError:
            continue
        assert str(ARGUMENTS) not in text
        if '{"city": "Z\u00fcrich \\"old\\"", "deep": true, "days": [1, null], "near": {"sea": false}}' in text:
            whole.add(path.stem)
    assert {name for name, form in forms.items() if form == "text"} == AS_TEXT
    assert whole == set(JSON.split())


def test_a_null_in_a_list_that_a_template_of_gemma_4_writes_as_none_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token, tokenizer.chat_template = "<|endoftext|>", (TRL / "gemma4.jinja").read_text()
    chat = ChatTemplate(tokenizer, "X")
    text = chat.text(calling(days=[1, None]).messages[:2], calling().tools)
    assert python_in(tool_call("get_weather", days=[1, None]), text) == "[1, None]"
    assert python_in(tool_call("get_weather", days=[1, 2]), text) is None
