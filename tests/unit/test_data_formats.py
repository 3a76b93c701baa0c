"""Row formats: what each becomes as a conversation, and every way in which a row can be wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.data.formats import FORMATS, own_field
from finetune.data.rows import RowError
from finetune.data.types import Message

EXAMPLES = Path(__file__).parents[2] / "data" / "examples"
USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
SYSTEM = {"role": "system", "content": "be brief"}


def convert(row_format: str, row: dict[str, Any]) -> list[Message]:
    return FORMATS[row_format](row).messages


def refusal(row_format: str, row: dict[str, Any]) -> str:
    with pytest.raises(RowError) as caught:
        convert(row_format, row)
    return str(caught.value.problem("f", 7)).removeprefix("f:7: ")


def test_messages_are_kept_as_they_are_and_further_keys_of_the_row_are_ignored() -> None:
    row = {"messages": [SYSTEM, USER, ASSISTANT], "split": "values"}
    assert convert("messages", row) == [SYSTEM, USER, ASSISTANT]


def test_prompt_and_completion_become_user_and_assistant() -> None:
    assert convert("prompt_completion", {"prompt": "hi", "completion": "hello"}) == [USER, ASSISTANT]


def test_alpaca_joins_instruction_and_input_by_an_empty_line() -> None:
    assert convert("alpaca", {"instruction": "Add", "input": "1 2", "output": "3"})[0]["content"] == "Add\n\n1 2"


@pytest.mark.parametrize("nothing", [{}, {"input": ""}, {"input": None}])
def test_alpaca_without_input_is_the_instruction_alone(nothing: dict[str, Any]) -> None:
    assert convert("alpaca", {"instruction": "hi", "output": "hello", **nothing}) == [USER, ASSISTANT]


def test_white_space_in_contents_is_kept() -> None:
    assert convert("prompt_completion", {"prompt": " a\r\n", "completion": "b \n"})[1]["content"] == "b \n"


@pytest.mark.parametrize("row_format", FORMATS)
def test_each_format_has_an_example_file_that_converts(row_format: str) -> None:
    rows = (EXAMPLES / f"{row_format}.jsonl").read_text(encoding="utf-8").splitlines()
    conversations = [convert(row_format, json.loads(row)) for row in rows]
    assert len(conversations) == 5
    assert all(conversation[-1]["role"] == "assistant" for conversation in conversations)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", 'messages: must be a list of messages; got "hi"; write [{role, content}, ...]'),
        ([], "messages: must be a list of messages; got []; write [{role, content}, ...]"),
        (["hi"], 'messages[0]: must be an object with role and content; got "hi"; write {role, content}'),
        ([{"content": "hi"}], "messages[0].role: is missing; got keys ['content']; a message has role and content"),
        ([{"role": "user"}], "messages[0].content: is missing; got keys ['role']; a message has role and content"),
        ([{"role": "human", "content": "a"}], 'messages[0].role: unknown role; got "human"; use one of'),
        ([USER, {"role": "assistant", "content": 3}], "messages[1].content: must be text; got 3; write a string"),
        ([USER, {"role": "assistant", "content": None}], "messages[1].content: must be text; got null; write a string"),
        ([USER, {"role": "assistant", "content": " \n"}], 'messages[1].content: is empty; got " \\n"; remove the'),
        ([USER, {"role": "assistant", "content": "\ud83d"}], "messages[1].content: half of a surrogate pair; got "),
        (
            [USER, {**ASSISTANT, "tool_calls": []}],
            "messages[1].tool_calls: is not supported and must not be ignored; got []; remove it: a message",
        ),
        ([USER, SYSTEM, ASSISTANT], "messages[1].role: a system message must come first; got "),
        ([SYSTEM, USER], 'messages: no assistant message, so nothing to learn; got ["system", "user"]; add'),
        ([ASSISTANT], 'messages: the assistant speaks before the user; got ["assistant"]; begin with a user message'),
        ([SYSTEM, ASSISTANT], "messages: the assistant speaks before the user; got "),
        ([USER, ASSISTANT, USER], "messages: the last message is not the assistant's; got "),
    ],
)
def test_wrong_messages_are_named(messages: object, message: str) -> None:
    assert refusal("messages", {"messages": messages}).startswith(message)


@pytest.mark.parametrize(
    ("row_format", "row", "message"),
    [
        ("messages", {"text": "a"}, "messages: is missing; got keys ['text']; add it, or name"),
        ("prompt_completion", {"prompt": "a"}, "completion: is missing; got keys ['prompt']"),
        ("prompt_completion", {"prompt": [USER], "completion": "a"}, "prompt: must be text; got [{"),
        ("prompt_completion", {"prompt": "a", "completion": ""}, 'completion: is empty; got ""'),
        ("alpaca", {"instruction": "a"}, "output: is missing; got keys ['instruction']"),
        ("alpaca", {"instruction": "a", "input": 3, "output": "b"}, "input: must be text; got 3"),
        ("alpaca", {"instruction": "", "output": "b"}, 'instruction: is empty; got ""'),
    ],
)
def test_wrong_fields_are_named(row_format: str, row: dict[str, Any], message: str) -> None:
    assert refusal(row_format, row).startswith(message)


def test_a_place_in_the_conversation_is_named_as_the_row_names_it() -> None:
    assert own_field("prompt_completion", "messages[1].content") == "completion"
    assert own_field("alpaca", "messages[0].content") == "instruction"
    assert own_field("messages", "messages[1].content") == "messages[1].content"
    assert own_field("alpaca", None) is None
