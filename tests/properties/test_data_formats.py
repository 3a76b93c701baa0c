"""What holds for every line of the table of formats: a new format is picked up here without a change."""

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.formats import FORMATS, reader, recognise
from finetune.data.row_errors import RowError
from tests.row_formats import ALL_EXAMPLES, convert, example_rows

every_format = pytest.mark.parametrize("row_format", FORMATS)
every_row = pytest.mark.parametrize(("row_format", "row"), ALL_EXAMPLES)
KINDS = {"conversation": "Conversation", "document": "Document", "preference": "Preference", "judged": "Judged"}
EMPTY: dict[type, Any] = {str: " ", list: [], dict: {}}
EXOTIC = "\U0001f469\u200d\U0001f467 e\u0301\r\n\x00\u05e9\u05dc\u05d5\u05dd\u200f\u2028{{ x }}\t "


def recognised_as(row_format: str) -> str:
    """`rendered` is the user's choice: its rows look like text."""
    return row_format if FORMATS[row_format].recognised else "text"


@every_format
def test_the_example_file_has_at_least_five_rows_that_read_as_what_the_table_says(row_format: str) -> None:
    examples = [convert(row_format, row) for row in example_rows(row_format)]
    assert len(examples) >= 5
    assert {type(example).__name__ for example in examples} == {KINDS[FORMATS[row_format].gives]}


@every_format
def test_the_example_file_is_recognised_as_its_own_format(row_format: str) -> None:
    assert recognise(example_rows(row_format)).format == recognised_as(row_format)


@every_row
def test_each_row_of_an_example_alone_is_recognised_as_its_own_format(row_format: str, row: dict[str, Any]) -> None:
    assert recognise([row]).format == recognised_as(row_format)


@every_format
def test_every_field_of_the_table_stands_in_a_row_of_the_example_file(row_format: str) -> None:
    keys = {key for row in example_rows(row_format) for key in row}
    each = FORMATS[row_format]
    assert [name for name in each.fields if name not in keys] == []


MIXED = ("messages", "prompt_completion", "preference", "kto")
"""A column of these examples holds texts and lists: Arrow has one kind a column."""


@pytest.mark.parametrize("row_format", [name for name in FORMATS if name not in MIXED])
def test_rows_that_went_through_arrow_with_a_null_for_every_missing_key_are_the_same(row_format: str) -> None:
    rows = example_rows(row_format)
    keys = {key for row in rows for key in row}
    back = pa.Table.from_pylist([{key: row.get(key) for key in keys} for row in rows]).to_pylist()
    assert [convert(row_format, row) for row in back] == [convert(row_format, row) for row in rows]
    assert recognise(back).format == recognised_as(row_format)


def spoilt(row_format: str, row: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(what was done, the field, the row) with one required field removed, nulled, of another kind, or emptied."""
    each = FORMATS[row_format]
    for name in each.required:
        column = next(key for key in (name, *each.aliases.get(name, ())) if key in row)
        yield "removed", name, {key: value for key, value in row.items() if key != column}
        yield "nulled", column, {**row, column: None}
        other_kind = True if type(row[column]) in EMPTY else "seven"
        yield "of another kind", column, {**row, column: other_kind}
        if type(row[column]) in EMPTY:
            yield "emptied", column, {**row, column: EMPTY[type(row[column])]}


@every_row
def test_a_spoilt_required_field_is_refused_by_its_own_name(row_format: str, row: dict[str, Any]) -> None:
    for what, column, wrong in spoilt(row_format, row):
        with pytest.raises(RowError) as caught:
            convert(row_format, wrong)
        named = str(caught.value.field)
        assert named == column or named.startswith((f"{column}.", f"{column}[")), (what, column, caught.value.what)
        assert caught.value.do


@every_row
def test_columns_may_have_any_name_and_errors_use_it(row_format: str, row: dict[str, Any]) -> None:
    each = FORMATS[row_format]
    present = [name for name in each.fields if name in row]
    columns = {name: f"my {name}" for name in present}
    renamed = {columns.get(key, key): value for key, value in row.items()}
    assert convert(row_format, renamed, **columns) == convert(row_format, row)
    for name, column in columns.items():
        with pytest.raises(RowError) as caught:
            convert(row_format, {**renamed, column: "seven" if isinstance(row[name], int | float) else True}, **columns)
        assert str(caught.value.field).startswith(column)


def leaves(value: Any) -> Iterator[str]:
    """Every text in a row, those in JSON text included as they stand."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from leaves(each)


def replaced(value: Any, text: str) -> Any:
    """The value with something exotic at the end of `text` wherever it stands; keys stay."""
    if isinstance(value, str):
        return value.replace(text, text + EXOTIC)
    if isinstance(value, dict):
        return {key: replaced(each, text) for key, each in value.items()}
    return [replaced(each, text) for each in value] if isinstance(value, list) else value


def contents(row_format: str, row: dict[str, Any]) -> list[str]:
    """What the example's messages say, or its text."""
    example = asdict(convert(row_format, row))
    lists = (example.get(name, []) for name in ("messages", "prompt", "chosen", "rejected", "completion"))
    return [message["content"] for each in lists for message in each] or [example["text"]]


@every_row
def test_any_text_comes_through_exactly(row_format: str, row: dict[str, Any]) -> None:
    before, whole = asdict(convert(row_format, row)), contents(row_format, row)
    in_row = list(leaves(row))
    # Whole contents that stand in the row, and texts of the row that stand in a content; longer than any role's name.
    texts = {text for text in whole if any(text in leaf for leaf in in_row)}
    texts |= {leaf for leaf in in_row if any(leaf in text for text in whole)}
    texts = {text for text in texts if len(text) > len("assistant")}
    assert texts
    for text in texts:
        assert asdict(convert(row_format, replaced(row, text))) == replaced(before, text)


scalars = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(allow_nan=True), st.text(max_size=5))
KEYS = sorted(
    {key for _, row in ALL_EXAMPLES for key in row} | {"role", "content", "from", "value", "tool_calls", "name"}
)
WORDS = ["user", "assistant", "system", "tool", "human", "gpt", "function_call", "[]", "{", "\ud83d", "\n\nHuman: a"]
anything = st.recursive(
    scalars | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a row."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths(inner, (*path, key))


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """An example row of any format with one to three things in it replaced, removed or added."""
    row: dict[str, Any] = copy.deepcopy(draw(st.sampled_from(ALL_EXAMPLES))[1])
    for _ in range(draw(st.integers(1, 3))):
        places = list(paths(row))
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        holder: Any = row
        for key in way:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "replace":
            holder[last] = draw(anything)
        elif action == "remove":
            del holder[last]
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from(KEYS))] = draw(anything)
        else:
            holder.insert(last, draw(anything))
    return row


@given(row=mutated())
@settings(deadline=None, max_examples=300)
def test_a_wrong_row_is_never_anything_but_a_row_error_that_can_be_printed(row: dict[str, Any]) -> None:
    for row_format in FORMATS:
        before = copy.deepcopy(row)
        try:
            json.dumps(asdict(reader(row_format)(row)), ensure_ascii=False).encode("utf-8")
        except RowError as error:
            str(error.problem("f", 1)).encode("utf-8")
        assert repr(row) == repr(before)


@given(rows=st.lists(mutated() | st.dictionaries(st.sampled_from(KEYS), anything), max_size=4))
@settings(deadline=None, max_examples=100)
def test_recognising_any_rows_names_a_format_or_says_why_not(rows: list[dict[str, Any]]) -> None:
    try:
        assert recognise(rows).format in FORMATS
    except RowError as error:
        str(error.problem("f", 1)).encode("utf-8")
