"""Formats of two answers to one prompt, and of judged answers, with what may be made pairs of."""

from typing import Any

import pytest

from finetune.data.formats import pairs
from finetune.data.types import Judged, Preference
from tests.row_formats import assistant, convert, pair, refusal, system, user

USER, GOOD, BAD, SYSTEM = user("hi"), assistant("hello"), assistant("what"), system("be brief")
PLAIN = Preference([USER], [GOOD], [BAD])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "hello", "rejected": "what"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "hello", "rejected": "what"},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_a_preference_with_its_prompt_beside_the_answers_or_before_them(row: dict[str, Any]) -> None:
    assert pair("preference", row) == PLAIN


def test_a_prompt_text_may_follow_a_system_message_of_the_lists() -> None:
    row = {"prompt": "hi", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}
    assert pair("preference", row) == Preference([SYSTEM, USER], [GOOD], [BAD])


def test_answers_may_go_on_over_several_turns() -> None:
    row = {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD]}
    assert pair("preference", row) == Preference([USER], [GOOD, USER, GOOD], [BAD])


def test_what_stands_in_both_lists_belongs_to_the_prompt_answers_included() -> None:
    row = {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}
    assert pair("preference", row) == Preference([USER, GOOD, USER], [GOOD], [BAD])


def test_the_same_pair_in_the_other_formats() -> None:
    lists = {"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert pair("ultrafeedback", {**lists, "score_chosen": 8.5, "score_rejected": 8}) == PLAIN
    start = "\n\nHuman: hi\n\nAssistant: "
    assert pair("hh", {"chosen": start + "hello", "rejected": start + "what"}) == PLAIN
    assert pair("orca_dpo", {"system": "", "question": "hi", "chosen": "hello", "rejected": "what"}) == PLAIN
    turns = {"chosen": {"from": "gpt", "value": "hello"}, "rejected": {"from": "gpt", "value": "what"}}
    assert pair("sharegpt_dpo", {"conversations": [{"from": "human", "value": "hi"}], **turns}) == PLAIN


def test_orca_has_a_system_text() -> None:
    row = {"system": "be brief", "question": "hi", "chosen": "hello", "rejected": "what"}
    assert pair("orca_dpo", row).prompt == [SYSTEM, USER]


def test_of_a_transcript_one_space_after_the_colon_belongs_to_the_frame() -> None:
    row = {"chosen": "\n\nHuman:  a \n\nb\n\nAssistant:c\n", "rejected": "\n\nHuman:  a \n\nb\n\nAssistant: d"}
    assert pair("hh", row) == Preference([user(" a \n\nb")], [assistant("c\n")], [assistant("d")])


@pytest.mark.parametrize(
    ("label", "desirable"), [(True, True), (False, False), (1, True), (0, False), ("False", False)]
)
def test_a_judged_answer(label: object, desirable: bool) -> None:
    row = {"prompt": "hi", "completion": "hello", "label": label}
    assert convert("kto", row) == Judged([USER], [GOOD], desirable)


LISTS: dict[str, Any] = {"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}
HH = "\n\nHuman: hi\n\nAssistant: "


@pytest.mark.parametrize(
    ("row_format", "row", "message"),
    [
        (
            "preference",
            {"chosen": "hello", "rejected": "what"},
            "prompt: is missing: two texts do not say where their prompt ends; add prompt, or name the format hh for",
        ),
        ("preference", {**LISTS, "rejected": "what"}, 'rejected: is not of the same kind as chosen; got "what"; write'),
        ("preference", {**LISTS, "rejected": LISTS["chosen"]}, "rejected: is the same answer as chosen; remove the ro"),
        ("preference", {**LISTS, "prompt": "ho"}, "prompt: is not what chosen and rejected begin with; write the same"),
        ("preference", {"chosen": [USER, GOOD], "rejected": [BAD]}, "rejected: does not begin with the same message a"),
        ("preference", {"chosen": [USER, GOOD], "rejected": [USER]}, "rejected: an answer must begin with the assista"),
        (
            "preference",
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, user("ho"), BAD]},
            'chosen[2].role: an answer must begin with the assistant; got ["user", "assistant"]; move what precedes it',
        ),
        (
            "preference",
            {"prompt": [USER, GOOD], "chosen": [GOOD], "rejected": [BAD]},
            "chosen[0].role: two assistant messages in a row; got ",
        ),
        (
            "preference",
            {**LISTS, "chosen": [USER, {**GOOD, "weight": 0}]},
            "chosen[1]: a message of a judged answer cannot be left out (train: false or weight 0); remove train and",
        ),
        ("ultrafeedback", {**LISTS, "score_chosen": 1, "score_rejected": 1}, "score_rejected: no preference: both ans"),
        (
            "ultrafeedback",
            {**LISTS, "score_chosen": 1, "score_rejected": 2.5},
            "score_rejected: is above the chosen answer's; got 2.5, chosen 1.0; remove the row",
        ),
        ("ultrafeedback", {**LISTS, "score_chosen": float("nan")}, "score_chosen: must be a number; got NaN; write th"),
        ("ultrafeedback", {**LISTS, "chosen": "hello"}, "chosen: must be a list of messages; got text; name the forma"),
        (
            "hh",
            {"chosen": "hello", "rejected": HH + "a"},
            'chosen: is not a transcript that begins with Human; got "hell',
        ),
        (
            "hh",
            {"chosen": "a" + HH + "b", "rejected": HH + "c"},
            "chosen: is not a transcript that begins with Human; got",
        ),
        ("hh", {"chosen": HH + "a", "rejected": HH + " "}, 'rejected: is empty; got " "'),
        ("hh", {"chosen": HH + "a", "rejected": "\n\nHuman: ho\n\nAssistant: b"}, "rejected: does not begin with the"),
        ("hh", {"chosen": HH + "a\n\nAssistant: b", "rejected": HH + "c"}, "chosen: two assistant messages in a row;"),
        ("orca_dpo", {"question": "a", "chosen": "b", "rejected": True}, "rejected: must be text; got true"),
        (
            "sharegpt_dpo",
            {"conversations": [USER, GOOD], "chosen": GOOD, "rejected": BAD},
            "chosen.role: two assistant messages in a row; got ",
        ),
        ("sharegpt_dpo", {"conversations": [USER], "chosen": USER, "rejected": BAD}, "chosen.role: an answer must beg"),
        ("sharegpt_dpo", {"conversations": [USER], "chosen": "a", "rejected": BAD}, "chosen: must be an object with f"),
        ("kto", {"prompt": "a", "completion": "b", "label": "good"}, 'label: must be true or false; got "good"; write'),
        ("kto", {"prompt": "a", "completion": "b", "label": 1.0}, "label: must be true or false; got 1.0"),
        ("kto", {"prompt": "a", "completion": [USER, GOOD], "label": 1}, "completion[0].role: an answer must begin wi"),
    ],
)
def test_what_is_no_preference_is_named(row_format: str, row: dict[str, Any], message: str) -> None:
    assert refusal(row_format, row).startswith(message)


def judged(prompt: str, answer: str, desirable: bool) -> Judged:
    return Judged([user(prompt)], [assistant(answer)], desirable)


def test_judged_answers_are_paired_on_the_same_prompt_in_order_and_each_once() -> None:
    rows = [
        judged("a", "bad", False),
        judged("b", "good", True),
        judged("a", "good", True),
        judged("b", "bad", False),
        judged("a", "also good", True),
        judged("a", "also bad", False),
    ]
    result = pairs(rows)
    assert [(good, bad) for _, good, bad in result.pairs] == [(2, 0), (1, 3), (4, 5)]
    assert result.pairs[0][0] == Preference([user("a")], [assistant("good")], [assistant("bad")])
    assert result.errors == []


def test_every_judged_answer_without_a_partner_is_an_error_that_says_so() -> None:
    rows = [
        judged("a", "good", True),
        judged("b", "bad", False),
        judged("c", "good", True),
        judged("c", "bad", False),
        judged("c", "worse", False),
        judged("d", "same", True),
        judged("d", "same", False),
        judged("d", "other", True),
    ]
    result = pairs(rows)
    assert [(good, bad) for _, good, bad in result.pairs] == [(2, 3)]
    assert [f"{index}: {error.field}: {error.what}" for index, error in result.errors] == [
        "0: label: its prompt has no undesirable answer, so it makes no pair",
        "1: label: its prompt has no desirable answer, so it makes no pair",
        "4: label: its prompt has no further desirable answer, so it makes no pair",
        "5: completion: the same answer to the same prompt is judged desirable and undesirable",
        "6: completion: the same answer to the same prompt is judged desirable and undesirable",
        "7: label: its prompt has no undesirable answer, so it makes no pair",
    ]
