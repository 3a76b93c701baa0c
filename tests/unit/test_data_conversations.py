"""Rows as conversations without a tokenizer: what evaluation reads."""

import json
from pathlib import Path

import pytest

from finetune.data import read_conversations
from finetune.errors import DataError

SHORT = {"prompt": "set the timer", "completion": "done"}


def test_conversations_can_be_read_without_a_tokenizer_and_keep_the_rows_own_keys(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps({**SHORT, "split": "values"}) + "\n", encoding="utf-8")
    [(line, row, conversation)] = read_conversations(str(path), "prompt_completion")
    assert (line, row["split"]) == (2, "values")
    assert conversation.messages[-1] == {"role": "assistant", "content": "done"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1\n{}\n", r"f.jsonl:1: a row must be a JSON object; got 1; .*\n.*f.jsonl:2: prompt: is missing"),
        ("\n", "the file has no rows; fill it or leave it out"),
    ],
)
def test_conversations_that_cannot_be_read_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "f.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_conversations(str(tmp_path / "f.jsonl"), "prompt_completion")
