"""The quickstart's preference pairs: what they teach, and that what is counted by them is held out."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.quickstart import generate
from data.quickstart.pairs import NONE, OUTSIDE
from data.quickstart.wordings import INTENTS

FOLDER = Path(generate.__file__).parent
COMMANDS = {intent.command: intent for intent in INTENTS}
Rows = list[dict[str, Any]]


def read(name: str) -> Rows:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def requests(rows: Rows) -> list[str]:
    return [row["messages"][0]["content"] for row in rows]


@pytest.fixture(scope="module")
def pairs() -> Rows:
    return read("dpo-train.jsonl")


@pytest.fixture(scope="module")
def anchors(pairs: Rows) -> Rows:
    return [row for row in pairs if row["chosen"] != NONE]


@pytest.fixture(scope="module")
def held_out() -> Rows:
    return read("dpo-eval.jsonl")


def test_two_thirds_of_the_pairs_prefer_none_and_one_third_hold_on_to_a_command(pairs: Rows, anchors: Rows) -> None:
    assert len(pairs) == 288
    assert len(anchors) == 96
    assert all(row["chosen"] != row["rejected"] for row in pairs)
    assert len({row["prompt"] for row in pairs}) == len(pairs)


def test_what_none_is_preferred_to_is_an_invented_command(pairs: Rows) -> None:
    for row in pairs:
        if row["chosen"] == NONE:
            assert row["rejected"].startswith('{"command":"')
            assert not row["rejected"].startswith('{"command":"none')


def test_an_anchor_is_a_row_of_train_and_rejects_none_or_its_own_answer_with_a_key_too_much(anchors: Rows) -> None:
    trained = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in read("train.jsonl")}
    against_none = 0
    for row in anchors:
        assert trained[row["prompt"]] == row["chosen"]
        if row["rejected"] == NONE:
            against_none += 1
            continue
        chosen, rejected = json.loads(row["chosen"]), json.loads(row["rejected"])
        (extra,) = rejected.keys() - chosen.keys()
        assert extra not in COMMANDS[chosen["command"]].slots
        assert {key: rejected[key] for key in chosen} == chosen
        assert list(rejected) == [*chosen, extra]
    assert against_none == 72


def test_each_domain_has_equally_many_anchors(anchors: Rows) -> None:
    domains = [COMMANDS[json.loads(row["chosen"])["command"]].domain for row in anchors]
    assert {domain: domains.count(domain) for domain in domains} == dict.fromkeys(
        (intent.domain for intent in INTENTS), 16
    )


def test_every_topic_is_asked_equally_often(held_out: Rows) -> None:
    def count(rows: Rows) -> dict[str, int]:
        return Counter(row["topic"] for row in rows)

    trained = count([row for row in OUTSIDE if "invented" in row])
    asked = count([row for row in OUTSIDE if "invented" not in row])
    assert trained == dict.fromkeys(trained, 8)
    assert len(trained) == 24
    assert asked == {topic: 1 if topic in trained else 4 for topic in asked}
    assert len(asked) == 30
    splits = [row["split"] for row in held_out]
    assert splits.count("request") == splits.count("topic") == 24


def test_the_wanted_answer_to_every_held_out_request_is_none(held_out: Rows) -> None:
    assert {row["messages"][1]["content"] for row in held_out} == {NONE}


def test_no_held_out_request_occurs_in_training_nor_nearly(pairs: Rows, held_out: Rows) -> None:
    def runs_of_three(text: str) -> set[tuple[str, ...]]:
        words = "".join(each if each.isalnum() else " " for each in text.lower()).split()
        return {tuple(words[at : at + 3]) for at in range(max(1, len(words) - 2))}

    trained = [row["prompt"] for row in pairs] + requests(read("train.jsonl"))
    for request in requests(held_out):
        new = runs_of_three(request)
        for seen in trained:
            old = runs_of_three(seen)
            assert len(new & old) / len(new | old) <= 1 / 3, f"{request!r} is nearly {seen!r}"


def test_no_request_of_the_commands_evaluation_occurs_in_a_pair(pairs: Rows) -> None:
    assert not {row["prompt"] for row in pairs} & set(requests(read("eval.jsonl")))
