"""`data.train[1].path=x`: overrides that reach into one data set, or into a list of them."""

from pathlib import Path

import pytest

from tests.unit.recipe_writing import SOUND, RecipeFile, changed

ONE = "{path: rows.jsonl, format: messages}"
TWO = "[{path: a.jsonl, format: messages}, {path: b.jsonl, format: alpaca}]"
OF_TWO = changed((ONE, TWO))


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecipeFile:
    return RecipeFile(tmp_path, monkeypatch)


def test_overrides_reach_into_one_data_set_and_into_a_list(recipe_file: RecipeFile) -> None:
    assert recipe_file.load(SOUND, "data.train.path=x").data.sources("train")[0].path == "x"
    recipe = recipe_file.load(OF_TWO, "data.train[0].weight=1", "data.train[1].weight=2", "data.train[1].path=c.jsonl")
    assert [(data_set.path, data_set.weight) for data_set in recipe.data.sources("train")] == [
        ("a.jsonl", 1.0),
        ("c.jsonl", 2.0),
    ]
    assert len(recipe_file.load(SOUND, f"data.train={TWO}").data.sources("train")) == 2
    assert len(recipe_file.load(OF_TWO, f"data.train={ONE}").data.sources("train")) == 1
    assert recipe_file.load(OF_TWO, f"data.train[1]={ONE}").data.sources("train")[1].path == "rows.jsonl"
    assert recipe_file.load(SOUND, "lora.targets[1]=router").lora.targets == ["attention", "router"]


@pytest.mark.parametrize(
    ("text", "override", "complaint"),
    [
        (
            OF_TWO,
            "data.train.path=x",
            "data.train.path: data.train is a list, not a section; got [{",
        ),
        (OF_TWO, "data.train[2].path=x", "data.train[2].path: data.train has 2 items, counted from 0; got [{"),
        (SOUND, "data.train[0].path=x", "data.train[0].path: data.train is a section, not a list; got {"),
        (SOUND, "data.eval[0].path=x", "data.eval[0].path: data.eval is nothing, not a list; got null"),
        (SOUND, "lora.r[0]=1", "lora.r[0]: lora.r is a value, not a list; got 8"),
        (OF_TWO, "data.train[1].weight=-1", "data.train[1].weight: out of range; got -1"),
        (OF_TWO, "data.train[1].pth=x", "data.train[1].pth: unknown key"),
        (SOUND, "data.train[x].path=x", 'not an override; got "data.train[x].path=x"'),
    ],
)
def test_a_wrong_override_of_a_data_set_is_an_error(
    recipe_file: RecipeFile, text: str, override: str, complaint: str
) -> None:
    lines = recipe_file.problems(text, override)
    assert lines[-1].startswith(f"command line: {complaint}")


def test_what_a_wrong_override_of_a_list_should_be(recipe_file: RecipeFile) -> None:
    assert recipe_file.problems(OF_TWO, "data.train.path=x")[0].endswith(
        "name one of its items, such as data.train[0].path"
    )
    assert recipe_file.problems(SOUND, "data.train[0].path=x")[0].endswith(
        "leave [0] out, or write the whole list, data.train=[...]"
    )
