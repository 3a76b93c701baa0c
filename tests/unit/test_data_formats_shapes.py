"""Shapes that lose nothing: a row of each is read as the plain row that says the same."""

import json
from typing import Any

import pyarrow as pa
import pytest

from finetune.data.formats import FORMATS, reader, recognise
from finetune.data.sources.json_files import parse_line
from finetune.data.sources.tables import rows_of
from finetune.data.types import Judged
from finetune.recipe.row_formats import Role
from tests.row_formats import assistant, convert, refusal, system, talk, user

USER, ANSWER, RESULT = user("hi"), assistant("done"), {"role": "tool", "content": "3"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Oslo"}}}
OTHER = {"type": "function", "function": {"name": "f", "arguments": {"city": "Bergen"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
BOTH = [USER, {**CALLING, "tool_calls": [CALL, OTHER]}, RESULT, RESULT, ANSWER]
TEXT, OTHER_TEXT = json.dumps(CALL["function"]), json.dumps(OTHER["function"])


def said(*messages: object) -> dict[str, Any]:
    return {"messages": list(messages)}


@pytest.mark.parametrize("nothing", [None, "", " ", [], {}, {"id": None, "parts": []}])
@pytest.mark.parametrize("key", ["annotations", "refusal", "audio", "function_call", "tool_calls", "name", "weight"])
def test_keys_of_a_message_that_say_nothing(key: str, nothing: object) -> None:
    assert talk("messages", said({**USER, key: nothing}, {**ANSWER, key: nothing})) == [USER, ANSWER]


def test_a_response_of_openai() -> None:
    answer = {**ANSWER, "refusal": None, "audio": None, "annotations": [], "function_call": None, "tool_calls": None}
    assert talk("messages", {**said(USER, answer), "parallel_tool_calls": False, "tools": None}) == [USER, ANSWER]
    parts = [{"type": "output_text", "text": "done", "annotations": []}]
    assert talk("messages", said(USER, {**ANSWER, "content": parts})) == [USER, ANSWER]


def test_messages_as_an_object_of_lists() -> None:
    columns = {"role": ["user", "assistant"], "content": ["hi", "done"], "name": [None, None], "tool_calls": []}
    assert talk("messages", {"messages": columns}) == [USER, ANSWER]
    assert talk("messages", {"messages": json.dumps(columns)}) == [USER, ANSWER]
    assert talk("sharegpt", {"conversations": {"from": ["human", "gpt"], "value": ["hi", "done"]}}) == [USER, ANSWER]
    answer = {"role": ["assistant"], "content": ["done"]}
    assert talk("prompt_completion", {"prompt": "hi", "completion": answer}) == [USER, ANSWER]
    (row,) = rows_of(pa.table({"messages": [{"role": ["user", "assistant"], "content": ["hi", "done"]}]}))
    assert isinstance(row, dict)
    assert talk("messages", row) == [USER, ANSWER]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"role": ["user", "assistant"], "content": ["hi"]},
            'messages: the lists of this object are not of one length; got {"role": 2, "content": 1}; write one entry',
        ),
        ({"role": 1, "content": "hi"}, "messages: must be a list of messages; got {"),
        ({"role": "user", "content": "hi"}, "messages[0].role: the last message is not the assistant's; got "),
        ({}, "messages: must be a list of messages; got {}; write [{role, content}, ...]"),
    ],
)
def test_objects_that_are_no_messages(value: object, message: str) -> None:
    assert refusal("messages", {"messages": value}).startswith(message)


@pytest.mark.parametrize("nothing", ["", " \n", None, []])
def test_an_empty_system_message_is_one_without_text(nothing: object) -> None:
    assert talk("messages", said({"role": "system", "content": nothing}, USER, ANSWER))[0] == system("")
    turns = [{"role": "system", "content": nothing}, USER, ANSWER]
    assert talk("sharegpt", {"conversations": turns, "system": "be brief"})[0] == system("be brief")


@pytest.mark.parametrize(("flag", "learned"), [({"loss": False}, False), ({"loss": True, "weight": 1}, True)])
def test_loss_says_whether_a_message_is_learned(flag: dict[str, Any], learned: bool) -> None:
    row = said(USER, {**ANSWER, **flag}, USER, ANSWER)
    assert talk("messages", row) == [USER, {**ANSWER, "train": learned}, USER, ANSWER]


def test_what_else_loss_may_not_be() -> None:
    for flag in ({"loss": 0.5}, {"loss": "no"}):
        assert refusal("messages", said(USER, {**ANSWER, **flag})).startswith("messages[1].loss: must be true or false")
    message = "messages[1].loss: contradicts train: false; got true; keep one of them"
    assert refusal("messages", said(USER, {**ANSWER, "train": False, "loss": True})) == message


@pytest.mark.parametrize("call", ["tool_call", "function_call"])
@pytest.mark.parametrize("result", ["tool_response", "function_response", "observation", "function", "ipython"])
def test_words_for_calls_and_results(call: str, result: str) -> None:
    row = said(USER, {"role": call, "content": TEXT}, {"role": result, "content": "3"}, ANSWER)
    assert talk("messages", row) == [USER, CALLING, RESULT, ANSWER]
    assert talk("sharegpt", {"conversations": row["messages"]}) == [USER, CALLING, RESULT, ANSWER]


def test_messages_in_the_words_of_sharegpt() -> None:
    row = said({"from": "human", "value": "hi"}, {"from": "gpt", "value": "done"})
    assert talk("messages", row) == [USER, ANSWER]


def test_tool_calls_as_json_text_bare_and_without_arguments() -> None:
    bare = CALL["function"]
    for calls in (json.dumps([CALL]), [bare], json.dumps([bare])):
        assert talk("messages", said(USER, {**CALLING, "tool_calls": calls}, RESULT, ANSWER))[1] == CALLING
    named = [{**bare, "id": "a", "type": "function"}]  # type: ignore[dict-item]
    assert talk("messages", said(USER, {**CALLING, "tool_calls": named}))[1] == {
        **CALLING,
        "tool_calls": [{**CALL, "id": "a"}],
    }
    nothings: list[Any] = ["", {}, "{}"]
    for nothing in nothings:
        called = talk("messages", said(USER, {**CALLING, "tool_calls": [{"name": "now", "arguments": nothing}]}))[1]
        assert called["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}


def test_the_function_call_that_openai_had_before_tool_calls() -> None:
    calling = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"city": "Oslo"}'}}
    row = {
        **said(USER, calling, {"role": "function", "name": "f", "content": "3"}, ANSWER),
        "functions": [{"name": "f"}],
    }
    plain = {**said(USER, CALLING, {**RESULT, "name": "f"}, ANSWER), "tools": [{"name": "f"}]}
    assert convert("messages", row) == convert("messages", plain)
    assert refusal("messages", said(USER, {**calling, "tool_calls": [CALL]})).startswith(
        "messages[1].function_call: is beside tool_calls; got "
    )
    assert refusal("messages", said({**USER, "function_call": {"name": "f", "arguments": {}}})).startswith(
        'messages[0].function_call: only the assistant calls tools; got "user"; move the calls'
    )
    assert refusal("messages", said(USER, {"role": "tool_call", "content": TEXT, "tool_calls": [CALL]})).startswith(
        "messages[1].tool_calls: the call is already in content; got "
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"h": 3.1, "ort": "Ås"}, '{"h": 3.1, "ort": "Ås"}'),
        ([], "[]"),
        ({}, "{}"),
        ([{"h": 3}], '[{"h": 3}]'),
        ([{"type": "river", "text": "Tay"}], '[{"type": "river", "text": "Tay"}]'),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        (3, "3"),
        (True, "true"),
    ],
)
def test_a_result_of_a_tool_that_is_no_text_is_written_as_json(content: object, text: str) -> None:
    row = said(USER, CALLING, {"role": "tool", "content": content}, ANSWER)
    assert talk("messages", row)[2] == {"role": "tool", "content": text}
    turns = [USER, CALLING, {"from": "observation", "value": content}, ANSWER]
    assert talk("sharegpt", {"conversations": turns})[2] == {"role": "tool", "content": text}


def test_a_result_that_cannot_be_written_is_refused() -> None:
    picture = [{"type": "image_url", "image_url": "a"}]
    for content, message in (
        (picture, 'messages[2].content[0].type: is not a text part; got "image_url"'),
        ({"a": b"b"}, "messages[2].content: cannot be written as JSON (Object of type bytes"),
    ):
        row = said(USER, CALLING, {"role": "tool", "content": content}, ANSWER)
        assert refusal("messages", row).startswith(message)


@pytest.mark.parametrize(
    "calls",
    [
        [{"role": "tool_call", "content": TEXT}, {"role": "tool_call", "content": OTHER_TEXT}],
        [{"from": "function_call", "value": CALL["function"]}, {"from": "function_call", "value": OTHER_TEXT}],
        [{"role": "tool_call", "content": f"[{TEXT}, {OTHER_TEXT}]"}],
        [CALLING, {**CALLING, "tool_calls": [OTHER]}],
    ],
)
def test_parallel_calls_are_one_message(calls: list[Any]) -> None:
    assert talk("messages", said(USER, *calls, RESULT, RESULT, ANSWER)) == BOTH
    assert talk("sharegpt", {"conversations": [USER, *calls, RESULT, RESULT, ANSWER]}) == BOTH


def test_a_call_that_is_a_message_of_its_own_continues_the_text_before_it() -> None:
    row = said(USER, assistant("wait"), {"role": "tool_call", "content": TEXT}, RESULT, ANSWER)
    assert talk("messages", row)[1] == {**CALLING, "content": "wait"}
    assert refusal("messages", said(USER, assistant("wait"), CALLING)).startswith(
        "messages[2].role: two assistant messages in a row"
    )
    row = said(USER, {**CALLING, "weight": 0}, CALLING, RESULT, RESULT, ANSWER)
    assert refusal("messages", row) == (
        "messages[2]: is not learned as messages[1] is, and both are one message of the assistant; write the same "
        "train, loss or weight in both"
    )


def test_a_null_argument_is_named_where_it_stands() -> None:
    null = json.dumps({"name": "f", "arguments": {"x": None}})
    tools = [{"name": "f", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]
    turns = [USER, {"role": "tool_call", "content": TEXT}, {"role": "tool_call", "content": null}, RESULT, ANSWER]
    message = "messages[2].content.x: is null, and the tool has no such argument; write "
    assert refusal("messages", {"messages": turns, "tools": tools}).startswith(message)


@pytest.mark.parametrize("question", ["query", "question"])
@pytest.mark.parametrize("answer", ["response", "answer"])
def test_other_names_of_prompt_and_completion(question: str, answer: str) -> None:
    row = {question: "hi", answer: "done", "system_prompt": "be brief", "history": '[["a", "b"]]'}
    plain = [system("be brief"), user("a"), assistant("b"), USER, ANSWER]
    assert recognise([row]).format == "prompt_completion"
    assert talk("prompt_completion", row) == plain
    assert talk("prompt_completion", {**row, "prompt": None, "completion": "", "history": plain[1:1]})[0] == plain[0]
    judged = {**row, "label": 1}
    assert recognise([judged]).format == "kto"
    assert convert("kto", judged) == Judged(plain[:-1], [ANSWER], True)


def test_two_columns_that_could_both_be_the_answer_are_refused_and_the_advice_works() -> None:
    row = {"question": "hi", "response": "done", "answer": "other"}
    assert refusal("prompt_completion", row) == (
        "response: this column and answer could both be completion; say which in the recipe: "
        "`columns: {completion: response}` or `columns: {completion: answer}`"
    )
    assert talk("prompt_completion", row, completion="response") == [USER, ANSWER]
    assert talk("prompt_completion", {**row, "answer": ""}) == [USER, ANSWER]
    own = {"prompt": "hi", "completion": "done", "answer": "other"}
    assert talk("prompt_completion", own) == [USER, ANSWER]


def test_a_prompt_of_messages_with_tools_and_no_second_system_text() -> None:
    row = {"prompt": [USER], "completion": [CALLING], "tools": [{"name": "f"}]}
    assert convert("prompt_completion", row) == convert("messages", {**said(USER, CALLING), "tools": [{"name": "f"}]})
    again = {"prompt": [system("a"), USER], "completion": "done", "system": "b"}
    assert refusal("prompt_completion", again).startswith("system: the row has a second system message in prompt[0]")


SPOKEN = [{"from": "customer", "value": "hi"}, {"from": "agent", "value": "done"}]
NAMED: dict[str, Role] = {"customer": "user", "agent": "assistant"}


@pytest.mark.parametrize(
    ("row_format", "row", "plain"),
    [
        ("sharegpt", {"conversations": SPOKEN}, {"conversations": [USER, ANSWER]}),
        ("messages", {"messages": SPOKEN}, {"messages": [USER, ANSWER]}),
        (
            "prompt_completion",
            {"prompt": SPOKEN[:1], "completion": SPOKEN[1:]},
            {"prompt": "hi", "completion": "done"},
        ),
        (
            "sharegpt_dpo",
            {"conversations": SPOKEN[:1], "chosen": SPOKEN[1], "rejected": {"from": "agent", "value": "no"}},
            {"conversations": [USER], "chosen": ANSWER, "rejected": assistant("no")},
        ),
    ],
)
def test_the_recipe_says_what_a_word_for_who_speaks_means(
    row_format: str, row: dict[str, Any], plain: dict[str, Any]
) -> None:
    assert reader(row_format, roles=NAMED)(row) == convert(row_format, plain)
    assert recognise([row], roles=NAMED).format == row_format


def test_all_unknown_words_of_a_row_are_named_with_what_to_write() -> None:
    assert refusal("sharegpt", {"conversations": SPOKEN}) == (
        'conversations[0].from: unknown role; got "customer"; use one of system, user, assistant, tool, or write in '
        'the recipe, beside format, which of them is meant: `roles: {"customer": user, "agent": assistant}`'
    )
    said_twice = refusal(
        "messages", said(USER, {"role": "AI", "content": "done"}, USER, {"role": "AI", "content": "x"})
    )
    assert said_twice.endswith('`roles: {"AI": assistant}`')


def test_a_word_that_the_recipe_names_is_no_longer_what_it_usually_means() -> None:
    row = said(USER, {"role": "tool_call", "content": "done"})
    assert reader("messages", roles={"tool_call": "assistant"})(row) == convert("messages", said(USER, ANSWER))


@pytest.mark.parametrize("number", ["42", "-7", "1.10", "1e3", "0.0", "12345678901234567890"])
def test_a_number_of_json_is_read_as_the_text_that_the_file_has_for_it(number: str) -> None:
    row: Any = parse_line(f'{{"number": {number}, "text": "{number}"}}'.encode())
    written, text = row["number"], row["text"]
    assert talk("messages", said(USER, {**ANSWER, "content": written})) == [USER, assistant(number)]
    for row_format in ("alpaca", "prompt_completion", "text", "preference", "orca_dpo"):
        fields = dict.fromkeys(FORMATS[row_format].required, "a")
        last = FORMATS[row_format].required[-1]
        with_prompt = {"prompt": "q", **fields} if row_format == "preference" else fields
        assert convert(row_format, {**with_prompt, last: written}) == convert(row_format, {**with_prompt, last: text})


def test_a_float_of_a_table_has_no_spelling() -> None:
    (row,) = rows_of(pa.table({"prompt": ["a"], "completion": [7.0]}))
    assert isinstance(row, dict)
    assert refusal("prompt_completion", row) == (
        "completion: is a number of a float column, which does not say how the text spells it; got 7.0; make it a "
        "column of texts, such as 7 or 7.50"
    )
    (row,) = rows_of(pa.table({"prompt": ["a"], "completion": [7]}))
    assert isinstance(row, dict)
    assert talk("prompt_completion", row)[1] == assistant("7")


def test_scores_and_labels_stay_numbers() -> None:
    row = parse_line(b'{"prompt": "a", "completion": "b", "label": 0}')
    assert isinstance(row, dict)
    assert convert("kto", row) == Judged([user("a")], [assistant("b")], False)
