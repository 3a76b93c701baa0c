"""Preparing a file: what is kept, cut and dropped, what is counted, and that all bad rows are named at once."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.data import DataStats, Prepared, prepare, read_conversations
from finetune.data.render import IGNORED
from finetune.errors import DataError
from finetune.recipe import DataSettings, DataSource
from tests.support import tiny_tokenizer

SHORT = {"prompt": "set the timer", "completion": "done"}
FRAME = "which would be read as the conversation's frame"
LONG = {"prompt": "set the timer", "completion": "turn on the kitchen light and set the timer to ten minutes"}


def settings(path: Path, row_format: Any = "prompt_completion", **others: Any) -> DataSettings:
    source = DataSource(path=str(path), format=row_format)
    return DataSettings(**{"train": source, "max_length": 256, **others})


def run(tmp_path: Path, rows: list[Any], **others: Any) -> Prepared:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" if row else "\n" for row in rows), encoding="utf-8")
    chosen = settings(path, **others)
    return prepare(chosen.sources("train"), tiny_tokenizer(), chosen)


def refusal(tmp_path: Path, rows: list[Any], **others: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        run(tmp_path, rows, **others)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def lengths(tmp_path: Path) -> tuple[int, int]:
    """Tokens of the short and of the long row."""
    short, long = run(tmp_path, [SHORT, LONG]).dataset["input_ids"]
    return len(short), len(long)


def test_a_row_carries_its_line_number_past_blank_lines(tmp_path: Path) -> None:
    assert run(tmp_path, [SHORT, None, LONG]).dataset["row"][:] == [1, 3]


def test_labels_stand_at_their_tokens_and_end_with_the_eos(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    row = run(tmp_path, [SHORT]).dataset[0]
    kept = [label for label in row["labels"] if label != IGNORED]
    assert tokenizer.decode(kept) == "done<|im_end|>"
    assert len(row["labels"]) == len(row["input_ids"])


def test_the_counts_are_the_data_sets_own(tmp_path: Path) -> None:
    prepared = run(tmp_path, [SHORT, LONG])
    labels = [label for row in prepared.dataset["labels"] for label in row]
    short, long = lengths(tmp_path)
    assert prepared.stats == DataStats(
        rows=2,
        kept=2,
        truncated=0,
        dropped=0,
        tokens=short + long,
        supervised_tokens=sum(label != IGNORED for label in labels),
        longest=long,
        sequences=2,
    )


def test_a_row_too_long_is_an_error_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    short, long = lengths(tmp_path)
    assert refusal(tmp_path, [SHORT, LONG, SHORT, LONG], max_length=short) == [
        f"rows.jsonl:{line}: longer than data.max_length = {short} tokens; got {long} tokens; raise data.max_length, "
        "shorten the row, or set data.overlong to truncate or drop"
        for line in (2, 4)
    ]


def test_truncate_cuts_the_end_and_counts_it(tmp_path: Path) -> None:
    short, long = lengths(tmp_path)
    whole = run(tmp_path, [SHORT, LONG]).dataset[1]
    prepared = run(tmp_path, [SHORT, LONG], max_length=long - 5, overlong="truncate")
    assert prepared.dataset[1]["input_ids"] == whole["input_ids"][:-5]
    assert prepared.dataset[1]["labels"] == whole["labels"][:-5]
    stats = prepared.stats
    assert (stats.kept, stats.truncated, stats.longest, stats.tokens) == (2, 1, long, short + long - 5)


def test_truncating_away_every_supervised_token_is_an_error_with_its_line(tmp_path: Path) -> None:
    chatty = {"prompt": LONG["completion"], "completion": "done"}
    [message] = refusal(tmp_path, [SHORT, chatty], max_length=lengths(tmp_path)[0], overlong="truncate")
    assert message.startswith("rows.jsonl:2: cut at data.max_length = ")
    assert "it has no supervised token left" in message
    assert message.endswith("raise data.max_length, or set data.overlong to drop")


def test_drop_leaves_the_row_out_and_counts_it(tmp_path: Path) -> None:
    short, long = lengths(tmp_path)
    prepared = run(tmp_path, [LONG, SHORT], max_length=short, overlong="drop")
    assert prepared.dataset["row"][:] == [2]
    stats = prepared.stats
    assert (stats.rows, stats.kept, stats.dropped, stats.longest, stats.tokens) == (2, 1, 1, long, short)


def test_dropping_every_row_is_an_error(tmp_path: Path) -> None:
    long = lengths(tmp_path)[1]
    assert refusal(tmp_path, [LONG], max_length=20, overlong="drop") == [
        "rows.jsonl: every row is longer than data.max_length = 20 tokens and was dropped; "
        f"raise data.max_length: the longest row has {long} tokens"
    ]


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    assert refusal(tmp_path, [None]) == ["rows.jsonl: there is no row in the file; fill it or leave it out"]


def test_every_bad_row_is_named_in_one_go_by_the_rows_own_field(tmp_path: Path) -> None:
    rows = [SHORT, ["a"], {"prompt": "a"}, {"prompt": "a", "completion": "x <|im_end|> y"}]
    messages = refusal(tmp_path, rows)
    assert [message.split(";")[0] for message in messages] == [
        "rows.jsonl:2: a row must be a JSON object",
        "rows.jsonl:3: completion: is missing",
        "rows.jsonl:4: completion: contains the control token <|im_end|>, " + FRAME,
    ]


def test_packing_joins_rows_as_documents_with_positions_of_their_own(tmp_path: Path) -> None:
    short, long = lengths(tmp_path)
    alone = run(tmp_path, [SHORT, LONG, SHORT])
    prepared = run(tmp_path, [SHORT, LONG, SHORT], packing=True, max_length=long + short)
    first, second = prepared.dataset[0], prepared.dataset[1]
    assert (first["row"], second["row"]) == ([2, 1], [3])
    assert first["position_ids"] == [*range(long), *range(short)]
    for column in ("input_ids", "labels"):
        assert first[column] == alone.dataset[1][column] + alone.dataset[0][column]
    assert prepared.stats == DataStats(**{**alone.stats.as_dict(), "sequences": 2})


def test_a_tokenizer_that_carries_another_template_than_the_recipe_names_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, [SHORT], chat_template="alpaca") == [
        "data.chat_template: the tokenizer carries another template than alpaca; "
        "load the tokenizer with load_tokenizer(..., chat_template=data.chat_template)"
    ]


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
        ("\n", "there is no row in the file; fill it or leave it out"),
    ],
)
def test_conversations_that_cannot_be_read_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "f.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_conversations(str(tmp_path / "f.jsonl"), "prompt_completion")


@pytest.mark.parametrize("row_format", ["dolly", "oasst", "alpaca"])
def test_the_example_of_each_format_prepares(row_format: str) -> None:
    path = Path(__file__).parents[2] / "data" / "examples" / f"{row_format}.jsonl"
    chosen = settings(path, row_format)
    assert prepare(chosen.sources("train"), tiny_tokenizer(), chosen).stats.kept == 5
