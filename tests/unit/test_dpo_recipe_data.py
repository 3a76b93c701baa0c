"""The settings of the rows in a recipe of preference tuning: what has no meaning for pairs of answers is refused."""

from pathlib import Path

import pytest

from finetune.recipe.row_formats import PAIR_FORMATS, ROW_FORMATS
from tests.unit.recipe_writing import RecipeFile, changed

ROWS = "{path: rows.jsonl, format: messages}"
DO = f"give pairs, in one of the formats {', '.join(PAIR_FORMATS)}, or write method.kind: sft"
SINGLE_FORMATS = [name for name in ROW_FORMATS if name not in PAIR_FORMATS]


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecipeFile:
    return RecipeFile(tmp_path, monkeypatch)


def dpo(written: str, *others: str) -> str:
    """The sound recipe for dpo with these data sets, and further lines of the section `data`."""
    lines = "".join(f"\n  {line}" for line in others)
    method = ("  kind: sft\n", "  kind: dpo\n  beta: 0.1\n")
    return changed(method, (ROWS, written), ("max_length: 256", f"max_length: 256{lines}"))


@pytest.mark.parametrize("name", ["auto", *PAIR_FORMATS])
def test_formats_of_pairs_and_auto_are_taken(recipe_file: RecipeFile, name: str) -> None:
    recipe = recipe_file.load(dpo(f"{{path: a, format: {name}}}", "overlong: truncate", "packing: true"))
    assert recipe.data.sources("train")[0].format == name


@pytest.mark.parametrize("which", ["train", "eval"])
@pytest.mark.parametrize("name", SINGLE_FORMATS)
def test_every_format_of_one_answer_or_none_is_refused(recipe_file: RecipeFile, name: str, which: str) -> None:
    pairs, single = "{path: a, format: preference}", f"{{path: b, format: {name}}}"
    text = dpo(single) if which == "train" else dpo(pairs, f"eval: {single}")
    line = 16 if which == "train" else 18
    assert recipe_file.problems(text) == [
        f"recipe.yaml:{line}: data.{which}.format: one answer per row, or none; method.kind: dpo compares two answers "
        f'to one prompt; got "{name}"; {DO}'
    ]


def test_the_place_in_a_list_is_named(recipe_file: RecipeFile) -> None:
    [line] = recipe_file.problems(dpo("[{path: a, format: hh}, {path: b, format: alpaca}]"))
    assert line.startswith("recipe.yaml:16: data.train[1].format: one answer per row, or none; ")


@pytest.mark.parametrize("name", ["last_assistant", "completion", "all"])
def test_dpo_rejects_another_loss_on_than_the_answers(recipe_file: RecipeFile, name: str) -> None:
    assert recipe_file.problems(dpo("{path: a, format: auto}", f"loss_on: {name}")) == [
        "recipe.yaml:18: data.loss_on: the loss of a pair is on its two answers, and nowhere else; "
        f'got "{name}"; write assistant, or remove this key'
    ]


def test_pairs_are_not_split(recipe_file: RecipeFile) -> None:
    assert recipe_file.problems(dpo("{path: a, format: auto}", "overlong: split")) == [
        "recipe.yaml:18: data.overlong: a pair cannot be split: its answers are compared whole; "
        'got "split"; write error, truncate or drop'
    ]


def test_conflicts_with_dpo_are_reported_at_once_and_only_for_dpo(recipe_file: RecipeFile) -> None:
    text = dpo("{path: a, format: text}", "loss_on: completion", "overlong: split")
    assert [line.split(": ")[1] for line in recipe_file.problems(text)] == [
        "data.train.format",
        "data.loss_on",
        "data.overlong",
    ]
    unknown = text.replace("kind: dpo\n  beta: 0.1", "kind: ppo")
    assert not any("compares two answers" in line or "data.overlong" in line for line in recipe_file.problems(unknown))


def test_an_sft_recipe_may_still_split_and_choose_its_loss(recipe_file: RecipeFile) -> None:
    recipe = recipe_file.load(changed(("max_length: 256", "max_length: 256\n  overlong: split\n  loss_on: all")))
    assert (recipe.data.overlong, recipe.data.loss_on) == ("split", "all")
