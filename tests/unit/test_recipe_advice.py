"""Advice is followed word by word for every conflict of the other tests: it must lead to a recipe that loads."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.errors import Problem, RecipeError
from finetune.recipe.schema import settings
from tests.unit.recipe_writing import SOUND, RecipeFile
from tests.unit.test_dpo_recipe import MISTAKES as PAIR_MISTAKES
from tests.unit.test_recipe_checks import CONFLICTS
from tests.unit.test_recipe_data import MISTAKES as DATA_MISTAKES
from tests.unit.test_recipe_mistakes import SINGLE_MISTAKES

TEXTS = {
    f"{name} ({kind})": text
    for kind, table in (
        ("between settings", CONFLICTS),
        ("pairs", PAIR_MISTAKES),
        ("data", DATA_MISTAKES),
        ("mistakes", SINGLE_MISTAKES),
    )
    for name, (text, _) in table.items()
}


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecipeFile:
    return RecipeFile(tmp_path, monkeypatch)


def steps(path: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.findall(r"\w+", path)]


def around(values: Any, path: list[Any]) -> Any:
    for part in path[:-1]:
        values = values.setdefault(part, {}) if isinstance(values, dict) else values[part]
    return values


def setting_of(key: str, path: list[Any]) -> list[Any] | None:
    """The path of a key in an advice: written in full, or beside the value that was wrong."""
    if key in settings():
        same_section = steps(key)[:-1] == [part for part in path[:-1] if not isinstance(part, int)]
        return [*path[:-1], steps(key)[-1]] if same_section else steps(key)
    if key.rpartition(".")[0] in settings():
        return steps(key)  # an entry of a mapping
    if path[:-1] == ["training", "trainer_args"]:
        return [*path[:-1], key]
    beside = ".".join(str(part) for part in (*path[:-1], key) if not isinstance(part, int))
    return [*path[:-1], key] if beside in settings() else None


def followed(recipe: Any, path: list[Any], advice: str) -> Any:
    """The recipe after the advice; None for advice that leaves to the user what to write."""
    values = copy.deepcopy(recipe)
    parent = around(values, path)
    if match := re.fullmatch(r"remove (?:it|this key)((?: and [\w.]+)*)(?:: .*)?", advice):
        del parent[path[-1]]
        for key in match[1].split(" and ")[1:]:
            del around(values, steps(key))[steps(key)[-1]]
    elif (match := re.fullmatch(r"write ([\w.]+): (\S+|\[.*\])( in place of \w+)?", advice)) and (
        place := setting_of(match[1], path)
    ):
        if match[3]:
            del parent[path[-1]]
        around(values, place)[place[-1]] = yaml.safe_load(match[2])
    elif match := re.fullmatch(r"(?:write|did you mean) (\[.*\]|[\w.-]+)\??", advice):
        value = parent.pop(path[-1], None) if isinstance(path[-1], str) else None
        if place := setting_of(match[1], path):
            around(values, place).setdefault(place[-1], value)  # of two, the user keeps one
        else:
            parent[path[-1]] = yaml.safe_load(match[1])
    else:
        return None
    return values


def alternatives(advice: str) -> list[str]:
    """The parts of an advice, each of which is said to help."""
    parts = re.split(r",? or (?=remove|write|add|take)|; (?=did you mean)", advice)
    return [re.sub(r", for all data sets of the recipe", "", part) for part in parts]


def complaints(recipe_file: RecipeFile, text: str) -> tuple[Problem, ...]:
    try:
        recipe_file.load(text)
    except RecipeError as error:
        return error.problems
    return ()


def test_every_advice_that_can_be_followed_word_by_word_helps(recipe_file: RecipeFile) -> None:
    tried, refused = 0, []
    for name, text in TEXTS.items():
        problems = complaints(recipe_file, text)
        if (
            len(problems) != 1
            or ": " not in problems[0].where
            or "duplicate" in problems[0].what
            or "YAML" in problems[0].what
        ):
            continue
        for advice in alternatives(problems[0].do):
            values = followed(yaml.safe_load(text), steps(problems[0].where.split(": ", 1)[1]), advice)
            if values is None:
                continue
            tried += 1
            refused += [f"{name}: {advice}: {next_one}" for next_one in complaints(recipe_file, yaml.safe_dump(values))]
    assert refused == []
    assert tried > 40


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("lora_r: 8", "another tool's name for a setting; got 8; remove it: lora.r is given"),
        ("max_steps: 8", "this key does not belong at the top level; got 8; remove it: training.max_steps is given"),
        (
            "modules_to_save: [x]",
            'no module is trained in full here; got ["x"]; remove it: lora.targets names what is adapted',
        ),
        ("warmup_ratio: 0.1", "warm-up is counted in steps here; got 0.1; write training.warmup_steps"),
    ],
)
def test_a_key_that_is_given_is_not_advised(recipe_file: RecipeFile, line: str, complaint: str) -> None:
    (problem,) = recipe_file.problems(SOUND + line + "\n")
    assert problem.endswith(complaint)
