"""The committed quickstart data: in sync with its generator, and its held-out rows really held out."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.quickstart import generate
from data.quickstart.wordings import INTENTS, SLOTS, Intent, Value

FOLDER = Path(generate.__file__).parent
Parsed = tuple[Intent, str, dict[str, Value]]


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def parse(row: dict[str, Any]) -> Parsed:
    """The one intent and wording that make this row out of its own answer's values."""
    request, reply = (message["content"] for message in row["messages"])
    answer = json.loads(reply)
    assert reply == json.dumps(answer, separators=(",", ":")), "one line of compact JSON"
    values = {key: value for key, value in answer.items() if key != "command"}
    found = [
        (intent, wording, values)
        for intent in INTENTS
        for wording in intent.trained + intent.held_out
        if intent.command == answer["command"] and tuple(values) == intent.slots and wording.format(**values) == request
    ]
    assert len(found) == 1, f"{request!r} -> {reply}"
    return found[0]


@pytest.fixture(scope="module")
def train() -> list[Parsed]:
    return [parse(row) for row in read("train.jsonl")]


@pytest.fixture(scope="module")
def held_out() -> list[tuple[str, Parsed]]:
    return [(row["split"], parse(row)) for row in read("eval.jsonl")]


def test_the_committed_files_are_what_the_generator_writes() -> None:
    assert {name: (FOLDER / name).read_bytes() for name in generate.files()} == {
        name: content.encode() for name, content in generate.files().items()
    }


def test_the_generator_is_a_plain_script_that_needs_only_the_standard_library(tmp_path: Path) -> None:
    target = tmp_path / "data" / "quickstart"
    target.mkdir(parents=True)
    for name in ("generate.py", "wordings.py", "pairs.py", "outside.jsonl"):
        (target / name).write_bytes((FOLDER / name).read_bytes())
    subprocess.run([sys.executable, "-I", str(target / "generate.py")], check=True, cwd=tmp_path, capture_output=True)
    for name in generate.files():
        assert (target / name).read_bytes() == (FOLDER / name).read_bytes()
    assert [path.name for path in target.iterdir() if path.name.endswith(".tmp")] == []


def test_no_request_is_asked_twice() -> None:
    requests = [row["messages"][0]["content"] for name in ("train.jsonl", "eval.jsonl") for row in read(name)]
    assert len(requests) == len(set(requests))


def test_held_out_rows_share_no_wording_and_value_combination_with_training(
    train: list[Parsed], held_out: list[tuple[str, Parsed]]
) -> None:
    trained = {(wording, tuple(values.items())) for _, wording, values in train}
    assert all((wording, tuple(values.items())) not in trained for _, (_, wording, values) in held_out)


def test_values_rows_have_a_trained_wording_and_a_value_that_training_never_shows(
    train: list[Parsed], held_out: list[tuple[str, Parsed]]
) -> None:
    wordings = {wording for _, wording, _ in train}
    shown = {pair for _, _, values in train for pair in values.items()}
    rows = [parsed for split, parsed in held_out if split == "values"]
    assert len(rows) == 42
    for _, wording, values in rows:
        assert wording in wordings
        assert set(values.items()) - shown


def test_wording_rows_have_a_wording_that_training_never_shows(
    train: list[Parsed], held_out: list[tuple[str, Parsed]]
) -> None:
    wordings = {wording for _, wording, _ in train}
    rows = [parsed for split, parsed in held_out if split == "wording"]
    assert len(rows) == 42
    assert all(wording not in wordings for _, wording, _ in rows)


def test_each_domain_is_asked_equally_often(train: list[Parsed], held_out: list[tuple[str, Parsed]]) -> None:
    domains = {intent.domain for intent in INTENTS}
    assert len(domains) == 6
    for domain in domains:
        assert sum(intent.domain == domain for intent, _, _ in train) == 120
        assert sum(parsed[0].domain == domain for _, parsed in held_out) == 14


def test_every_trained_wording_and_value_occurs_in_training(train: list[Parsed]) -> None:
    assert {wording for _, wording, _ in train} == {wording for intent in INTENTS for wording in intent.trained}
    shown = {pair for _, _, values in train for pair in values.items()}
    assert shown == {(slot, value) for slot, values in SLOTS.items() for value in values.trained}


def test_values_are_copied_verbatim_so_that_nothing_has_to_be_computed(train: list[Parsed]) -> None:
    for _, wording, values in train:
        assert all(str(value) in wording.format(**values) for value in values.values())


def test_trained_and_held_out_never_overlap_in_the_word_lists() -> None:
    assert all(not set(values.trained) & set(values.held_out) for values in SLOTS.values())
    assert all(not set(intent.trained) & set(intent.held_out) for intent in INTENTS)
