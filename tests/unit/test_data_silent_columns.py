"""Nothing that a row says is dropped or learned letter by letter without a word."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from finetune.data import prepare
from finetune.data.formats import reader, recognise
from finetune.data.formats.written_messages import written_messages
from finetune.data.row_errors import RowError
from finetune.data.types import contents_of
from finetune.recipe.row_formats import ROW_FORMATS
from tests.support import tiny_tokenizer
from tests.unit.test_data_prepare import settings, source

QUESTION, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "Is 91 prime?"), ("assistant", "No."), ("assistant", "Yes."))
)
SPELLINGS = {"JSON": json.dumps, "indented JSON": lambda value: json.dumps(value, indent=1), "Python": repr}
PLAIN: dict[str, dict[str, Any]] = {
    "preference": {"prompt": "Is 91 prime?", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
    "preference without prompt": {"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
    "ultrafeedback": {
        **{"prompt": "Is 91 prime?", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
        **{"score_chosen": 8, "score_rejected": 2},
    },
    "prompt_completion": {"prompt": [QUESTION], "completion": [GOOD]},
    "kto": {"prompt": [QUESTION], "completion": [GOOD], "label": True},
    "messages": {"messages": [QUESTION, GOOD]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Is 91 prime?"}, {"from": "gpt", "value": "No."}]},
    "sharegpt_dpo": {
        "conversations": [{"from": "human", "value": "Is 91 prime?"}],
        "chosen": {"from": "gpt", "value": "No."},
        "rejected": {"from": "gpt", "value": "Yes."},
    },
    "alpaca_dpo": {"instruction": "Is 91 prime?", "chosen": [GOOD], "rejected": [BAD]},
}


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("case", PLAIN)
def test_messages_written_as_text_are_read_as_messages(case: str, spell: Any) -> None:
    read, row = reader(case.split(" ")[0]), PLAIN[case]
    as_text = {name: spell(value) if isinstance(value, list | dict) else value for name, value in row.items()}
    assert read(as_text) == read(row)
    assert recognise([as_text]).format == recognise([row]).format == case.split(" ")[0]


@pytest.mark.parametrize(
    "text",
    ["[1, 2]", '[{"name": "Oban"}]', "[]", "{'a': 1}", "[INST] x [/INST]", '{"role": "admin"', "role: user", "{role}"],
)
def test_a_text_that_is_a_list_of_something_else_stays_a_text(text: str) -> None:
    if text == '{"role": "admin"':
        with pytest.raises(RowError, match=r"neither JSON nor Python"):
            written_messages(text, "completion")
        return
    assert written_messages(text, "completion") is None
    assert contents_of(reader("prompt_completion")({"prompt": "List", "completion": text}))[-1] == text


def refusal(row_format: str, row: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> str:
    with pytest.raises(RowError) as caught:
        reader(row_format, columns)(row)
    return str(caught.value.problem("rows.jsonl", 1)).removeprefix("rows.jsonl:1: ")


def test_messages_as_text_that_cannot_be_read_or_stand_where_text_belongs_are_refused() -> None:
    numpy = "[{'content': 'Hi', 'role': 'user'}\n {'content': 'Hello', 'role': 'assistant'}]"
    assert "chosen: begins like a list of messages written as text, and is neither JSON nor Python; got" in refusal(
        "preference", {"prompt": "Hi", "chosen": numpy, "rejected": numpy}
    )
    for row_format, field in (
        ("alpaca", "output"),
        ("alpaca", "input"),
        ("dolly", "response"),
        ("orca_dpo", "question"),
    ):
        row = {"instruction": "a", "output": "b", "response": "b", "question": "q", "chosen": "c", "rejected": "r"}
        fields = {name: value for name, value in row.items() if name in reader(row_format).format.fields}
        said = refusal(row_format, {**fields, field: json.dumps([QUESTION, GOOD])})
        assert said.startswith(
            f"{field}: is a list of messages written as text, where this format has a plain text; got"
        )


REVERSED = {**PLAIN["ultrafeedback"], "score_chosen": 2.0, "score_rejected": 8.5}


@pytest.mark.parametrize("rows", [[REVERSED], [REVERSED] * 3 + [PLAIN["ultrafeedback"]]], ids=["all", "most"])
def test_a_strict_format_speaks_for_itself_where_it_refuses_the_rows(rows: list[dict[str, Any]]) -> None:
    assert recognise(rows).format == "ultrafeedback"
    assert "score_rejected: is above the chosen answer's; got 8.5, chosen 2.0; remove" in refusal(
        "ultrafeedback", REVERSED
    )


@pytest.mark.parametrize(
    "names",
    [("score_chosen", "score_rejected"), ("chosen_rating", "rejected_rating"), ("chosen-rating", "rejected-rating")],
)
@pytest.mark.parametrize("row_format", ["preference", "alpaca_dpo", "orca_dpo", "sharegpt_dpo", "hh"])
def test_scores_beside_the_answers_must_not_contradict_them(row_format: str, names: tuple[str, str]) -> None:
    row = (
        PLAIN.get(row_format)
        or {
            "orca_dpo": {"question": "q", "chosen": "c", "rejected": "r"},
            "hh": {"chosen": "\n\nHuman: q\n\nAssistant: c", "rejected": "\n\nHuman: q\n\nAssistant: r"},
        }[row_format]
    )
    read = reader(row_format)
    read({**row, names[0]: "8.5", names[1]: 2})
    read({**row, names[0]: "good", names[1]: None})
    assert f"{names[1]}: is above the chosen answer's; got 8.5, chosen 2.0" in refusal(
        row_format, {**row, names[0]: 2, names[1]: "8.5"}
    )
    assert f"{names[1]}: no preference: both answers have this score" in refusal(
        row_format, {**row, names[0]: 7.5, names[1]: 7.5}
    )


def test_rows_whose_keys_fit_a_format_get_its_problems_with_their_lines() -> None:
    assert recognise([{"instruction": "a", "response": 3}]).format == "dolly"
    assert recognise([{"messages": [{"role": "user", "content": "a", "mood": "b"}]}]).format == "messages"
    with pytest.raises(RowError, match="the rows fit no format"):
        recognise([{"prompt": "a", "reply": "b"}])


RANKED = {
    "instruction": "Shorten the sentence.",
    "input": "The boat had a hole.",
    "chosen": "It leaked.",
    "rejected": "Boat.",
}


def test_pairs_with_an_input_have_a_format() -> None:
    assert recognise([RANKED]).format == "alpaca_dpo"
    pair: Any = reader("alpaca_dpo")({**RANKED, "system": "Be brief.", "history": [["Hi", "Hello"]]})
    assert [message["content"] for message in pair.prompt] == [
        "Be brief.",
        "Hi",
        "Hello",
        "Shorten the sentence.\n\nThe boat had a hole.",
    ]
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == ("It leaked.", "Boat.")


PART_OF_THE_PROMPT = [
    *(("prompt_completion", column) for column in ("input", "context", "passage", "choices", "options")),
    *(("dolly", column) for column in ("system", "system_prompt", "history", "tools", "functions")),
]


@pytest.mark.parametrize(("row_format", "column"), PART_OF_THE_PROMPT)
def test_a_column_with_a_part_of_the_prompt_is_not_dropped(row_format: str, column: str) -> None:
    row = {"question": "q", "answer": "a", column: ["x"] if column in ("history", "tools") else "The boat had a hole."}
    columns = dict(zip(ROW_FORMATS[row_format].required, ("question", "answer"), strict=True))
    said = refusal(row_format, row, columns)
    assert said.startswith(f"{column}: is not read by the format {row_format}; got ")
    assert said.endswith(f"or write ignore_columns: [{column}]")
    nothing: list[Any] = [None, "", " ", [], {}, "[]"]
    for empty in nothing:
        reader(row_format, columns)({**row, column: empty})
    assert reader(row_format, columns, [column])(row) == reader(row_format, columns)({**row, column: None})


def test_what_stands_in_the_example_anyway_is_not_dropped() -> None:
    row = {"messages": [{"role": "system", "content": "Be brief."}, QUESTION, GOOD], "system": "Be brief."}
    reader("messages")(row)
    assert "system: is not read by the format messages" in refusal("messages", {**row, "system": "Be long."})


@pytest.mark.parametrize(
    ("row_format", "column", "meant"),
    [
        ("alpaca", "inptu", "input"),
        ("alpaca", "sytem", "system"),
        ("dolly", "contxt", "context"),
        ("sharegpt", "tool", "tools"),
        ("alpaca", "Input", "input"),
    ],
)
def test_a_misspelt_optional_column_is_named(row_format: str, column: str, meant: str) -> None:
    row = {
        "alpaca": {"instruction": "a", "output": "b"},
        "dolly": {"instruction": "a", "response": "b"},
        "sharegpt": PLAIN["sharegpt"],
    }[row_format]
    said = refusal(row_format, {**row, column: "The boat had a hole."})
    assert f"{column}: is not read by the format {row_format}; got" in said
    assert f"did you mean {meant}? rename it, map it with columns: {{{meant}: {column}}}" in said
    reader(row_format)({**row, column: ""})
    if meant != "tools":
        reader(row_format, {meant: column})({**row, column: "The boat had a hole."})


def test_ids_and_sources_are_ignored() -> None:
    reader("alpaca")(
        {"instruction": "a", "output": "b", "id": "7", "source": "x", "text": "a b", "prompt_id": 3, "date": "d"}
    )


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "NULL", "null", "<NA>", "N/A"])
@pytest.mark.parametrize(("row_format", "column"), [("alpaca", "input"), ("alpaca", "system"), ("dolly", "context")])
def test_a_word_for_nothing_is_no_input(row_format: str, column: str, word: str) -> None:
    row = {"instruction": "a", "output": "b", "response": "b"}
    said = refusal(row_format, {**{name: row[name] for name in reader(row_format).format.required}, column: word})
    assert said.startswith(f"{column}: is a word for nothing, and would be learned as a text; got ")


def test_a_word_for_nothing_as_an_answer_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,completion\nHow many?,None\nWho?,nan\nWhy?,Because.\n")
    chosen = settings(source(file))
    stats = prepare(chosen.sources("train"), tiny_tokenizer(), chosen, seed=0).stats
    assert (stats.placeholders, stats.rows) == (2, 3)
    assert "66.7 % with nan, None or NULL as a message" in stats.lines()[0]
