"""Columns by the recipe's names, and the file's own places for what is found wrong after reading."""

from typing import Any

import pytest

from finetune.data.formats import reader
from finetune.errors import DataError
from tests.row_formats import assistant, refusal, talk, user

MAPPED = {"prompt": "question", "completion": "answer"}


def test_columns_map_fields_of_the_format_to_columns_of_the_file() -> None:
    row = {"question": "hi", "answer": "hello", "prompt": "something else"}
    assert talk("prompt_completion", row, **MAPPED) == [user("hi"), assistant("hello")]


def test_a_column_that_the_row_lacks_is_named_even_where_the_field_is_optional() -> None:
    row = {"instruction": "a", "output": "b"}
    assert refusal("alpaca", row, input="context") == (
        "context: is missing; got keys ['instruction', 'output']; columns.input names it: correct that, or add the "
        "column"
    )


def test_errors_name_the_files_own_columns() -> None:
    row = {"question": "hi", "answer": True}
    assert refusal("prompt_completion", row, **MAPPED).startswith(
        "answer: must be text or a list of messages; got true"
    )
    turns = {"dialog": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]}
    assert refusal("sharegpt", turns, conversations="dialog").startswith("dialog[1].value: is empty; ")


def test_unknown_fields_of_columns_are_refused_with_those_that_there_are() -> None:
    with pytest.raises(DataError) as caught:
        reader("alpaca", {"prompt": "question", "response": "answer"})
    assert str(caught.value).splitlines() == [
        f"columns.{field}: the format alpaca has no such field; got '{column}'; its fields are instruction, output, "
        "input, system, history, reasoning; write {field: column of the file}"
        for field, column in (("prompt", "question"), ("response", "answer"))
    ]


def test_one_column_for_two_fields_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        reader("preference", {"chosen": "answer", "rejected": "answer"})
    assert str(caught.value) == (
        "columns.rejected: the column is already mapped to chosen; got 'answer'; name another column"
    )


def test_an_unknown_format_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(DataError, match=r"^format: unknown format; got 'alpacca'; use one of messages, sharegpt, "):
        reader("alpacca")


TALK = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
TREE: dict[str, Any] = {
    "text": "hi",
    "role": "prompter",
    "replies": [{"text": "bad", "role": "assistant", "rank": 1}, {"text": "good", "role": "assistant", "rank": 0}],
}


@pytest.mark.parametrize(
    ("row_format", "row", "place", "own"),
    [
        ("prompt_completion", {"prompt": "a", "completion": "b"}, "messages[1].content", "completion"),
        ("alpaca", {"instruction": "a", "output": "b"}, "messages[0].content", "instruction"),
        ("alpaca", {"instruction": "a", "input": "c", "output": "b"}, "messages[0]", "instruction and input"),
        (
            "alpaca",
            {"instruction": "a", "output": "b", "history": [["c", "d"]]},
            "messages[1].content",
            "history[0][1]",
        ),
        ("alpaca", {"instruction": "a", "output": "b"}, "messages", None),
        ("messages", {"messages": [user("a"), assistant("b")]}, "messages[1].content", "messages[1].content"),
        (
            "messages",
            {"messages": [user("a"), assistant("b")]},
            "messages[1].tool_calls[0]",
            "messages[1].tool_calls[0]",
        ),
        ("sharegpt", {"conversation": TALK}, "messages[1].content", "conversation[1].value"),
        ("sharegpt", {"conversation": TALK}, "messages[1].role", "conversation[1].from"),
        ("sharegpt", {"conversation": TALK}, "messages[1]", "conversation[1]"),
        ("sharegpt", {"conversation": TALK}, "messages", "conversation"),
        ("sharegpt", {"conversations": TALK, "system": "a"}, "messages[2].content", "conversations[1].value"),
        ("sharegpt", {"conversations": TALK, "system": "a"}, "messages", None),
        ("sharegpt", {"conversations": TALK}, "tools", "tools"),
        ("oasst", {"prompt": TREE}, "messages[1].content", "prompt.replies[1].text"),
        (
            "messages",
            {"messages": [user("a"), {**assistant("b"), "thinking": "c"}]},
            "messages[1].reasoning",
            "messages[1].thinking",
        ),
        ("alpaca", {"instruction": "a", "output": "b", "reasoning": "c"}, "messages[1].reasoning", "reasoning"),
        ("text", {"text": "a"}, "text", "text"),
        ("orca_dpo", {"question": "a", "chosen": "b", "rejected": "c"}, "prompt[0].content", "question"),
        ("orca_dpo", {"question": "a", "chosen": "b", "rejected": "c"}, "rejected[0]", "rejected"),
        ("kto", {"prompt": "a", "completion": "b", "label": True}, "completion[0].content", "completion"),
        ("messages", {"messages": [user("a"), assistant("b")]}, None, None),
    ],
)
def test_a_place_in_the_example_is_named_as_the_file_names_it(
    row_format: str, row: dict[str, Any], place: str | None, own: str | None
) -> None:
    assert reader(row_format).locate(row, place) == own


def test_places_go_by_renamed_columns() -> None:
    row = {"question": "hi", "answer": "hello"}
    assert reader("prompt_completion", MAPPED).locate(row, "messages[1].content") == "answer"
    odd = {"data[0].x": "hi", "answer": "hello"}
    assert reader("prompt_completion", {**MAPPED, "prompt": "data[0].x"}).locate(odd, "messages[0]") == "data[0].x"
