"""Real data sets, where they lie beside the repository: each is read whole by the format that it is recognised as."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from finetune.data.formats import reader, recognise
from finetune.data.row_errors import RowError
from finetune.data.types import Conversation, Preference

DATASETS = Path(__file__).parents[3] / "shared" / "datasets"
pytestmark = pytest.mark.skipif(not DATASETS.is_dir(), reason="no data sets beside the repository")
GSM8K = {"prompt": "question", "completion": "answer"}


def rows_of(name: str) -> list[dict[str, Any]]:
    text = (DATASETS / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.split("\n") if line]


@pytest.mark.parametrize(
    ("name", "row_format", "columns", "count"),
    [
        ("alpaca_en_demo.json", "alpaca", {}, 999),
        ("glaive_toolcall_en_demo.json", "sharegpt", {}, 300),
        ("dpo_en_demo.json", "sharegpt_dpo", {}, 300),
        ("gsm8k_train.jsonl", "prompt_completion", GSM8K, 7473),
        ("gsm8k_test.jsonl", "prompt_completion", GSM8K, 1319),
    ],
)
def test_a_real_set_is_recognised_and_every_row_of_it_is_read(
    name: str, row_format: str, columns: dict[str, str], count: int
) -> None:
    rows = rows_of(name)
    assert recognise(rows, columns).format == row_format
    read = reader(row_format, columns)
    assert sum(isinstance(read(row), Conversation | Preference) for row in rows) == len(rows) == count


def test_the_calls_of_the_tool_set_are_all_there_with_their_tools() -> None:
    read = reader("sharegpt")
    calls, roles = 0, Counter[str]()
    for row in rows_of("glaive_toolcall_en_demo.json"):
        example = read(row)
        assert isinstance(example, Conversation)
        assert (example.tools is None) == (row["tools"] == "[]")
        roles.update(message["role"] for message in example.messages)
        for message in example.messages:
            names = [call["function"]["name"] for call in message.get("tool_calls", [])]
            calls += len(names)
            assert {tool["function"]["name"] for tool in example.tools or []} >= set(names)
    assert calls == roles["tool"] == 211


def test_a_set_whose_answers_are_nested_deeper_fits_no_format_and_the_error_says_what_is_missing() -> None:
    with pytest.raises(RowError) as caught:
        recognise(rows_of("self_instruct_seed_tasks.jsonl"))
    assert caught.value.what == "the rows fit no format"
    assert "alpaca (lacks output)" in caught.value.do
