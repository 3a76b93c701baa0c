"""`format: auto`: named with the reason; what is ambiguous or fits nothing is an error with the line to write."""

from collections.abc import Iterator
from typing import Any

import pytest

from finetune.data.formats import recognise
from finetune.data.row_errors import RowError
from tests.row_formats import assistant, example_rows, user

LISTS: dict[str, Any] = {"chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]}
ALPACA = {"instruction": "Add 1 and 2.", "input": "", "output": "3"}


def refusal(rows: list[Any], **columns: str) -> str:
    with pytest.raises(RowError) as caught:
        recognise(rows, columns)
    return str(caught.value.problem("rows.jsonl", 1)).removeprefix("rows.jsonl:1: ")


def test_it_says_which_keys_and_values_spoke_for_the_format() -> None:
    rows = [ALPACA] * 2 + [{**ALPACA, "input": "now"}] + [{"instruction": "a", "output": ""}]
    assert recognise(rows).why == (
        "keys instruction (text), output (text); input is text in 1 of 4 rows; 3 of 4 rows read"
    )
    assert recognise(example_rows("kto")[:1]).why == (
        "keys prompt (text), completion (text), label (true or false); 1 of 1 rows read"
    )
    assert recognise(example_rows("sharegpt_dpo")[-1:]).why == (
        "keys conversation (a list), chosen (an object), rejected (an object); 1 of 1 rows read"
    )


@pytest.mark.parametrize(
    ("row", "row_format"),
    [
        (LISTS, "preference"),
        ({**LISTS, "prompt": "hi"}, "preference"),
        ({**LISTS, "prompt": "hi", "score_chosen": 2, "score_rejected": 1}, "ultrafeedback"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, "hh"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "orca_dpo"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"prompt": "a", "completion": "b", "label": True}, "kto"),
        ({"prompt": "a", "completion": "b", "label": "sports"}, "prompt_completion"),
        ({"prompt": {"text": "a", "role": "prompter", "replies": [{"text": "b", "role": "assistant"}]}}, "oasst"),
        ({"text": "a", "label": 3}, "text"),
    ],
)
def test_values_decide_not_key_names_alone(row: dict[str, Any], row_format: str) -> None:
    assert recognise([row]).format == row_format


def test_rows_of_equal_scores_are_still_ultrafeedback_so_that_they_are_refused_and_not_read_as_another_format() -> None:
    row = {**LISTS, "prompt": "hi", "score_chosen": 2}
    assert recognise([{**row, "score_rejected": 1}, {**row, "score_rejected": 2}]).format == "ultrafeedback"


def test_a_text_column_that_holds_the_other_columns_is_the_same_row_rendered() -> None:
    rendered = {**ALPACA, "text": "### Instruction:\nAdd 1 and 2.\n\n### Response:\n3"}
    assert recognise([rendered]).format == "alpaca"
    assert refusal([rendered, {**ALPACA, "text": "something else"}]).startswith("the rows fit more than one format; ")


@pytest.mark.parametrize(
    ("row", "row_format"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"prompt": "a", "completion": "b", "label": True}, "kto"),
    ],
)
def test_a_text_column_with_all_contents_gives_way_to_pairs_too(row: dict[str, Any], row_format: str) -> None:
    assert recognise([{**row, "text": "a b c"}]).format == row_format
    assert refusal([{**row, "text": "x y z"}]).startswith("the rows fit more than one format; ")


def test_two_formats_that_read_the_same_are_no_ambiguity() -> None:
    turns = [user("hi"), assistant("yes")]
    assert recognise([{"messages": turns, "conversations": turns}]).format == "messages"
    assert refusal([{"messages": turns, "conversations": [user("ho"), assistant("no")]}]).startswith(
        "the rows fit more"
    )


def test_two_formats_that_fit_are_an_error_that_lists_both_with_the_reason_and_the_line_to_write() -> None:
    rows = [{**LISTS, "messages": LISTS["chosen"], "prompt": "hi"}]
    assert refusal(rows) == (
        "the rows fit more than one format; write one of "
        "`format: messages` (key messages (a list); 1 of 1 rows read) or "
        "`format: preference` (keys chosen (a list), rejected (a list); prompt is text in 1 of 1 rows; 1 of 1 rows "
        "read)"
    )


def test_what_fits_nothing_is_an_error_with_the_keys_and_the_nearest_formats() -> None:
    assert refusal([{"question": "a", "reply": "b"}]) == (
        "the rows fit no format; got keys ['question', 'reply']; nearest: prompt_completion (lacks completion), "
        "orca_dpo (lacks chosen, rejected), kto (lacks completion, label). Write "
        "the format, and map its fields to your keys with columns: {field: key}"
    )
    assert refusal([{}]).startswith("the rows fit no format; got keys []; Write the format, and map ")


def test_single_messages_of_an_openassistant_tree_are_not_taken_for_texts() -> None:
    rows = [{"text": "hello"}, {"message_id": "b", "parent_id": None, "text": "hello", "role": "prompter"}]
    assert refusal(rows).startswith("parent_id: the row is one message of an OpenAssistant tree; got null; use the")


def test_with_columns_only_formats_that_have_these_fields_are_tried() -> None:
    rows = [{"question": "a", "answer": "b"}]
    found = recognise(rows, {"prompt": "question", "completion": "answer"})
    assert found.format == "prompt_completion"
    assert found.why.startswith("keys question (text), answer (text); ")
    assert refusal(rows, prompts="question") == (
        "no format has all the fields that columns names; got ['prompts']; name fields of one format"
    )


def test_rows_that_are_broken_do_not_count_and_a_hundred_sound_ones_are_enough() -> None:
    def rows() -> Iterator[dict[str, Any] | RowError]:
        yield RowError(None, "not valid JSON", "fix it")
        for _ in range(100):
            yield ALPACA
        raise AssertionError("one row too many was read")

    assert recognise(rows()).why.endswith("100 of 100 rows read")
    assert refusal([RowError(None, "not valid JSON", "fix it")]) == (
        "no valid row to recognise a format by; name the format, and fix the rows"
    )


def test_question_and_answer_beside_messages_or_a_pair_are_not_what_the_rows_are_recognised_by() -> None:
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a"}]
    beside = {"question": "a", "answer": "b"}
    for row, row_format in (
        ({**beside, "messages": [*chat, {"role": "assistant", "content": "c"}]}, "messages"),
        ({"prompt": "a", "response": "b", "chosen": "b", "rejected": "c"}, "preference"),
        ({**beside, "text": "a b"}, "prompt_completion"),
        ({"question": "a", "answer": "b"}, "prompt_completion"),
    ):
        assert recognise([row]).format == row_format
