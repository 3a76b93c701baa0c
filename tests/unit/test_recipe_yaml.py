"""The YAML 1.2 reading: numbers are numbers, words are words, nothing is constructed or expanded."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.recipe.yaml import MAX_BYTES, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 0.0002),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("16", 16),
        ("+3", 3),
        ("0o17", 15),
        ("0x1F", 31),
        ("017", 17),
        ("1_000", "1_000"),
        ("190:20", "190:20"),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("True", True),
        ("false", False),
        ("~", None),
        ("null", None),
        ('"2e-4"', "2e-4"),
        ("'true'", "true"),
        ("2026-11-22", "2026-11-22"),
        ("[1, no, 2e-4]", [1, "no", 0.0002]),
        ("{a: {b: .inf}}", {"a": {"b": math.inf}}),
        ("1" * 5000, "1" * 5000),
    ],
)
def test_scalars_follow_the_yaml_1_2_core_schema(text: str, value: object) -> None:
    reading = read_yaml(text)
    assert reading.values == value
    assert type(reading.values) is type(value)
    assert not reading.mistakes


def test_every_key_and_list_item_has_its_line() -> None:
    reading = read_yaml("a:\n  b: 1\n  c:\n    - x\n    - y\n")
    assert reading.lines == {("a",): 1, ("a", "b"): 2, ("a", "c"): 3, ("a", "c", 0): 4, ("a", "c", 1): 5}


def test_a_billion_laughs_is_never_expanded() -> None:
    rows = ["a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 20)]
    started = time.process_time()
    reading = read_yaml("\n".join(rows))
    assert time.process_time() - started < 1
    assert {mistake.what for mistake in reading.mistakes} == {
        "YAML anchors are not allowed",
        "YAML aliases are not allowed",
    }


@pytest.mark.parametrize("bracket", ["[", "{? ", "- "])
def test_deep_nesting_is_rejected_at_once(bracket: str) -> None:
    started = time.process_time()
    reading = read_yaml(bracket * (MAX_BYTES // len(bracket)))
    assert time.process_time() - started < 1
    assert reading.fatal
    assert "nested too deeply" in reading.mistakes[-1].what


@given(st.text(max_size=200))
def test_read_yaml_never_raises(text: str) -> None:
    reading = read_yaml(text)
    assert reading.fatal <= bool(reading.mistakes)
