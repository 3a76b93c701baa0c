"""Reasoning of the assistant: read from wherever files have it, refused where it would be lost or is ambiguous."""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from finetune.check.duplicates import words_of
from finetune.data.formats import pairs, reader, recognise
from finetune.data.sources.tables import rows_of
from finetune.data.types import Conversation, Judged, Message, Preference, RowContent, contents_of
from tests.row_formats import assistant, convert, refusal, talk, user

USER, OTHER = user("Is 91 prime?"), assistant("Yes.")
THOUGHT = "91 = 7 * 13"
ANSWER = Message(role="assistant", content="No.", reasoning=THOUGHT)
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
CALLING = {"role": "assistant", "content": "", "reasoning": THOUGHT, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "3"}
KEYS = ("reasoning_content", "reasoning", "thinking")


def thinking(key: str, text: object = f"\n{THOUGHT} \n") -> dict[str, Any]:
    return {"role": "assistant", "content": "No.", key: text}


def talked(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


def in_parts(*parts: Any, **further: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(parts), **further}


TEXT = {"type": "text", "text": "No."}


def rows_with(answer: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], RowContent]]:
    """The answer in each format that has messages, and what is to be read."""
    plain, both = Conversation([USER, ANSWER]), Preference([USER], [ANSWER], [OTHER])
    turn = {"from": "gpt", "value": answer["content"], **answer}
    del turn["role"], turn["content"]
    lists = {"role": ["user", "assistant"], "content": [USER["content"], answer["content"]]}
    lists |= {key: [None, value] for key, value in answer.items() if key not in lists}
    yield "messages", talked(USER, answer), plain
    yield "messages", {"messages": json.dumps([USER, answer])}, plain
    yield "messages", {"messages": repr([USER, answer])}, plain
    yield "messages", {"messages": lists}, plain
    yield "sharegpt", {"conversations": [{"from": "human", "value": USER["content"]}, turn]}, plain
    yield "sharegpt", {"conversation": [USER, answer]}, plain
    yield "prompt_completion", {"prompt": [USER], "completion": [answer]}, plain
    yield "prompt_completion", {"prompt": "Is 91 prime?", "completion": json.dumps(answer)}, plain
    yield "preference", {"prompt": "Is 91 prime?", "chosen": [answer], "rejected": [OTHER]}, both
    yield "preference", {"chosen": [USER, answer], "rejected": [USER, OTHER]}, both
    scored = {"prompt": "Is 91 prime?", "score_chosen": 2, "score_rejected": 1}
    yield "ultrafeedback", {**scored, "chosen": [USER, answer], "rejected": [USER, OTHER]}, both
    yield "sharegpt_dpo", {"conversations": [USER], "chosen": turn, "rejected": OTHER}, both
    yield "kto", {"prompt": [USER], "completion": [answer], "label": True}, Judged([USER], [ANSWER], True)


@pytest.mark.parametrize("key", KEYS)
def test_every_format_with_messages_reads_every_key(key: str) -> None:
    for row_format, row, content in rows_with(thinking(key)):
        assert convert(row_format, row) == content, row_format
        assert recognise([row]).format == row_format
    turned = {key: THOUGHT, "role": "assistant", "content": "No."}
    assert talk("prompt_completion", {"prompt": "Is 91 prime?", "completion": json.dumps([turned])}) == [USER, ANSWER]


def test_in_a_table_all_messages_have_the_key() -> None:
    turns = [{**USER, "thinking": None}, thinking("thinking")]
    (row,) = rows_of(pa.table({"reasoning_language": ["French"], "messages": [turns]}))
    assert isinstance(row, dict)
    assert recognise([row]).format == "messages"
    assert talk("messages", row) == [USER, ANSWER]


@pytest.mark.parametrize("nothing", [None, "", " \n", [], {}])
@pytest.mark.parametrize("key", [*KEYS, "reasoning_details"])
def test_a_key_without_text_is_no_reasoning(key: str, nothing: object) -> None:
    assert talk("messages", talked({**USER, key: nothing}, thinking(key, nothing))) == [USER, assistant("No.")]


def test_keys_that_agree_are_one_reasoning_and_others_are_refused() -> None:
    said = {**thinking("reasoning_content"), "reasoning": THOUGHT, "thinking": None}
    assert talk("messages", talked(USER, said)) == [USER, ANSWER]
    assert refusal("messages", talked(USER, {**said, "thinking": "It is odd."})) == (
        "messages[1].thinking: is another reasoning than messages[1].reasoning_content; got "
        '"It is odd." and "91 = 7 * 13"; keep one of the two'
    )
    both = in_parts({"type": "thinking", "thinking": "It is odd."}, TEXT, reasoning=THOUGHT)
    assert refusal("messages", talked(USER, both)).startswith(
        "messages[1].content: is another reasoning than messages[1].reasoning; got "
    )


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_only_the_assistant_has_reasoning(role: str) -> None:
    turn = {"role": role, "content": "a", "thinking": "b"}
    assert refusal("messages", talked(turn, USER, assistant("c"))) == (
        f'messages[0].thinking: only the assistant\'s messages have reasoning; got "{role}"; remove it, or move it to '
        "the assistant's message"
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "must be text; got 3; write a string"),
        (True, "must be text; got true; write a string"),
        ({"content": "a"}, 'must be text; got {"content": "a"}; write a string'),
        (["a"], 'must be text; got ["a"]; write a string'),
        ("nan", 'is a word for nothing, and would be learned as a text; got "nan"; write null, or leave it empty'),
        ("\ud800", "half of a surrogate pair; "),
    ],
)
def test_reasoning_that_is_no_text(value: object, message: str) -> None:
    assert refusal("messages", talked(USER, thinking("reasoning", value))).startswith(
        f"messages[1].reasoning: {message}"
    )


@pytest.mark.parametrize(
    "part",
    [
        {"type": "thinking", "thinking": THOUGHT},
        {"type": "thinking", "thinking": f"{THOUGHT}\n", "signature": "EqQB", "text": None},
        {"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}], "closed": True},
        {"type": "reasoning", "text": THOUGHT},
        {"type": "reasoning", "reasoning": THOUGHT},
    ],
)
def test_parts_of_reasoning_before_the_text(part: dict[str, Any]) -> None:
    for parts in ([part, TEXT], [{"type": "text", "text": ""}, part, {**TEXT, "thinking": None}]):
        assert talk("messages", talked(USER, in_parts(*parts))) == [USER, ANSWER]
        turns = {"conversations": [USER, {"from": "gpt", "value": parts}]}
        assert talk("sharegpt", turns) == [USER, ANSWER]
    assert talk("messages", talked(USER, in_parts(part, TEXT, thinking=THOUGHT))) == [USER, ANSWER]
    assert talk("messages", talked(USER, in_parts(part, tool_calls=[CALL])))[1] == CALLING


def test_several_parts_are_one_text() -> None:
    parts = [{"type": "thinking", "thinking": text} for text in ("91 = ", None, "7 * 13")]
    assert talk("messages", talked(USER, in_parts(*parts, TEXT))) == [USER, ANSWER]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            [TEXT, {"type": "thinking", "thinking": "b"}],
            '[1]: is reasoning after the text of the message; got "b"; move it before the text, or remove it',
        ),
        ([{"type": "redacted_thinking", "data": "x"}, TEXT], '[0].type: is not a text part; got "redacted_thinking"; '),
        (
            [{"type": "thinking", "thinking": "b", "closed": False}, TEXT],
            "[0].closed: is not supported and must not be ignored; got false; remove it: a part of reasoning has type "
            "and thinking, or type and text",
        ),
        ([{"type": "reasoning", "text": "b", "reasoning": "c"}, TEXT], "[0].text: is beside reasoning; got "),
        ([{"type": "thinking", "thinking": 3}, TEXT], "[0].thinking: must be text; got 3; write a string"),
        (
            [{"type": "reasoning", "summary": ["b"]}, TEXT],
            '[0].summary: is not supported and must not be ignored; got ["b"]; ',
        ),
        ([{"type": "thinking", "thinking": "b"}], ": is empty; "),
    ],
)
def test_parts_that_are_refused(parts: list[Any], message: str) -> None:
    assert refusal("messages", talked(USER, in_parts(*parts))).startswith(f"messages[1].content{message}")


def test_a_part_of_reasoning_in_the_users_message_or_in_a_tools_result() -> None:
    part = {"type": "thinking", "thinking": "b"}
    assert refusal("messages", talked({"role": "user", "content": [part, TEXT]}, ANSWER)).startswith(
        'messages[0].content: only the assistant\'s messages have reasoning; got "user"; '
    )
    row = talked(USER, {**CALLING}, {"role": "tool", "content": [part]}, ANSWER)
    assert talk("messages", row)[2]["content"] == json.dumps([part])


def detailed(*details: Any, **further: Any) -> dict[str, Any]:
    return talked(USER, {**assistant("No."), "reasoning_details": list(details), **further})


def test_the_details_of_openrouter() -> None:
    details = [
        {"type": "reasoning.text", "text": text, "signature": "x", "format": "y", "id": None, "index": i}
        for i, text in enumerate(("91 = ", None, "7 * 13"))
    ]
    assert talk("messages", detailed(*details)) == [USER, ANSWER]
    assert talk("messages", detailed(*details, reasoning=THOUGHT)) == [USER, ANSWER]
    assert talk("messages", talked(USER, {**assistant("No."), "reasoning_details": json.dumps(details)})) == [
        USER,
        ANSWER,
    ]
    assert talk("messages", detailed(details[1])) == [USER, assistant("No.")]
    assert refusal("messages", detailed(*details, reasoning="b")).startswith(
        "messages[1].reasoning_details: is another reasoning than messages[1].reasoning; got "
    )


@pytest.mark.parametrize(
    ("detail", "message"),
    [
        (
            {"type": "reasoning.encrypted", "data": "x"},
            '[1]: is not reasoning as text; got "reasoning.encrypted"; remove the row, or reasoning_details to train '
            "without what it hides",
        ),
        ({"type": "reasoning.summary", "summary": "x"}, '[1]: is not reasoning as text; got "reasoning.summary"; '),
        ("x", '[1]: is not reasoning as text; got "x"; '),
        ({"type": "reasoning.text", "text": 3}, "[1].text: must be text; got 3; write a string"),
        ({"type": "reasoning.text", "text": "b", "step": 2}, "[1].step: is not supported and must not be ignored; "),
    ],
)
def test_details_that_are_refused(detail: object, message: str) -> None:
    first = {"type": "reasoning.text", "text": THOUGHT}
    said = refusal("messages", detailed(first, detail, reasoning=THOUGHT))
    assert said.startswith(f"messages[1].reasoning_details{message}")


def test_details_that_are_no_list() -> None:
    row = talked(USER, {**assistant("No."), "reasoning_details": {"type": "reasoning.text", "text": "b"}})
    assert refusal("messages", row).startswith("messages[1].reasoning_details: must be a list; got {")


@pytest.mark.parametrize("content", [None, "", [], "absent"])
def test_beside_calls_every_way_to_write_no_content_is_the_same(content: object) -> None:
    kept = {} if content == "absent" else {"content": content}
    calls: list[dict[str, Any]] = [{"tool_calls": [CALL]}, {"function_call": CALL["function"]}]
    for called in calls:
        for thought in ({}, {"thinking": THOUGHT}):
            turn = {"role": "assistant", **kept, **called, **thought}
            plain = CALLING if thought else {key: CALLING[key] for key in ("role", "content", "tool_calls")}
            assert talk("messages", talked(USER, turn, RESULT, ANSWER)) == [USER, plain, RESULT, ANSWER]
    lists = {"role": ["user", "assistant"], "content": ["Is 91 prime?", None], "tool_calls": [None, [CALL]]}
    assert talk("messages", {"messages": {**lists, "thinking": [None, THOUGHT]}}) == [USER, CALLING]


def test_an_answer_of_reasoning_alone_is_refused() -> None:
    for content in ("", " "):
        row = talked(USER, {**thinking("thinking"), "content": content})
        assert refusal("messages", row).startswith("messages[1].content: is empty; ")


def test_reasoning_before_calls_that_are_messages_of_their_own() -> None:
    call = {"role": "tool_call", "content": json.dumps(CALL["function"])}
    row = talked(USER, {**call, "reasoning": THOUGHT}, call, RESULT, RESULT, ANSWER)
    assert talk("messages", row)[1] == {**CALLING, "tool_calls": [CALL, CALL]}
    again = talked(USER, {**call, "reasoning": THOUGHT}, {**call, "thinking": THOUGHT}, RESULT, RESULT, ANSWER)
    assert talk("messages", again) == talk("messages", row)
    for first in (call, {**call, "thinking": "b"}, assistant("Wait.")):
        turns = [USER, first, {**call, "thinking": THOUGHT}, RESULT, ANSWER]
        assert refusal("messages", {"messages": turns}) == (
            "messages[2].thinking: stands behind messages[1], and both are one message of the assistant; got "
            '"91 = 7 * 13"; write its reasoning in the first'
        )


COLUMNS: list[tuple[str, dict[str, Any]]] = [
    ("alpaca", {"instruction": "Is 91 prime?", "output": "No."}),
    ("dolly", {"instruction": "Is 91 prime?", "response": "No."}),
    ("prompt_completion", {"prompt": "Is 91 prime?", "completion": "No."}),
    ("prompt_completion", {"question": "Is 91 prime?", "answer": "No."}),
    ("prompt_completion", {"prompt": [USER], "completion": [assistant("No.")]}),
]


@pytest.mark.parametrize(("row_format", "row"), COLUMNS)
def test_a_column_of_reasoning_belongs_to_the_answer(row_format: str, row: dict[str, Any]) -> None:
    thought = {**row, "reasoning": f" {THOUGHT}\n"}
    assert recognise([thought]).format == row_format
    assert talk(row_format, thought) == [USER, ANSWER]
    assert talk(row_format, {**row, "Complex_CoT": THOUGHT}, reasoning="Complex_CoT") == [USER, ANSWER]
    assert convert(row_format, thought) == reader(row_format, {}, ["id"])(thought)
    assert convert(row_format, row) == reader(row_format, {}, ["reasoning"])(thought)
    no_reasoning: list[Any] = [None, "", " ", [], "on", "Off", True, 4]
    for value in no_reasoning:
        assert talk(row_format, {**row, "reasoning": value}) == [USER, assistant("No.")]


@pytest.mark.parametrize(("row_format", "row"), COLUMNS)
@pytest.mark.parametrize("column", ["reasoning_content", "thinking", "cot", "Complex_CoT", "chain_of_thought"])
def test_a_column_of_reasoning_with_another_name_is_refused_and_the_advice_works(
    row_format: str, row: dict[str, Any], column: str
) -> None:
    thought = {**row, column: THOUGHT}
    for also in ({}, {"reasoning": "on"}):
        assert refusal(row_format, {**thought, **also}) == (
            f'{column}: is not read by the format {row_format}; got "91 = 7 * 13"; did you mean reasoning? rename it, '
            f"map it with columns: {{reasoning: {column}}}, or write ignore_columns: [{column}]"
        )
        assert talk(row_format, {**thought, **also}, reasoning=column) == [USER, ANSWER]
    assert reader(row_format, {}, [column])(thought) == convert(row_format, row)
    convert(row_format, {**row, column: "on"})


def test_other_columns_whose_names_are_near() -> None:
    row = {**COLUMNS[0][1], "reason": "sampled", "reasoning_type": "arithmetic", "reasoning_effort": "high"}
    assert convert("alpaca", row) == convert("alpaca", COLUMNS[0][1])


@pytest.mark.parametrize("column", ["reasoning", "thinking", "cot"])
def test_a_column_of_reasoning_beside_messages_pairs_or_a_text_is_not_dropped(column: str) -> None:
    values: list[Any] = [THOUGHT, {"style": "freetext", "content": THOUGHT}]
    rows = [(name, row) for name, row, _ in rows_with(dict(assistant("No."))) if name != "prompt_completion"]
    for value in values:
        for row_format, row in [*rows, ("text", {"text": "a"})]:
            assert refusal(row_format, {**row, column: value}).startswith(f"{column}: is not read by the format ")
            assert reader(row_format, {}, [column])({**row, column: value}) == convert(row_format, row)
    assert refusal("messages", {**talked(USER, OTHER), column: THOUGHT}).endswith(
        'got "91 = 7 * 13"; write it into the assistant\'s message under reasoning_content (formats with messages), or '
        f"write ignore_columns: [{column}]"
    )
    convert("messages", {**talked(USER, ANSWER), column: THOUGHT})
    convert("messages", {**talked(USER, OTHER), column: "off"})


def test_a_column_of_reasoning_beside_a_completion_of_messages() -> None:
    row = {"prompt": [USER], "completion": [ANSWER], "reasoning": THOUGHT}
    assert talk("prompt_completion", row) == [USER, ANSWER]
    assert refusal("prompt_completion", {**row, "reasoning": "b"}) == (
        'reasoning: is another reasoning than completion[0].reasoning; got "b" and "91 = 7 * 13"; keep one of the two'
    )
    assert refusal("prompt_completion", {**row, "completion": [CALLING, RESULT, ANSWER]}) == (
        'reasoning: is the reasoning of one answer, and the row has messages; got "91 = 7 * 13"; write it into the '
        "message that it belongs to, under reasoning_content"
    )


def test_a_column_of_reasoning_that_is_no_text() -> None:
    row = COLUMNS[0][1]
    assert refusal("alpaca", {**row, "mode": "on"}, reasoning="mode") == (
        'mode: is a label, not reasoning; got "on"; map the column that has the text, or remove it from columns'
    )
    assert refusal("alpaca", {**row, "reasoning": ["a"]}).startswith('reasoning: must be text; got ["a"]; ')
    assert refusal("alpaca", {**row, "reasoning": "nan"}).startswith("reasoning: is a word for nothing, ")


def test_answers_that_differ_in_reasoning_alone_differ() -> None:
    other = Message(role="assistant", content="No.", reasoning="It is odd.")
    row = {"prompt": "Is 91 prime?", "chosen": [ANSWER], "rejected": [other]}
    assert convert("preference", row) == Preference([USER], [ANSWER], [other])
    assert pairs([Judged([USER], [ANSWER], True), Judged([USER], [other], False)]).errors == []


def test_reasoning_is_among_the_contents_and_not_what_duplicates_go_by() -> None:
    example = Conversation([USER, ANSWER])
    assert contents_of(example) == ["Is 91 prime?", THOUGHT, "No."]
    assert words_of(example) == words_of(Conversation([USER, assistant("No.")])) == "Is 91 prime?\nNo."
    rendered = {**talked(USER, ANSWER), "text": f"Is 91 prime? <think>{THOUGHT}</think> No."}
    assert recognise([rendered]).format == "messages"
