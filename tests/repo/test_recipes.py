"""Every shipped recipe loads; the schema and the reference say what the settings say."""

import argparse
import ast
from pathlib import Path

import pytest

from finetune.cli import schema
from finetune.recipe import load_recipe
from finetune.recipe.trainer_args import reserved

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def test_the_recipes_of_the_readme_are_there() -> None:
    shipped = {str(path.relative_to(ROOT / "recipes")) for path in RECIPES}
    sft = {"quickstart/sft-qlora.yaml", "mixtral-8x7b/sft-qlora.yaml", "mistral-7b/sft-qlora.yaml"}
    dpo = {"quickstart/dpo.yaml", "mixtral-8x7b/dpo-qlora.yaml"}
    assert sft | dpo <= shipped


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_recipe_loads_and_names_the_schema_for_editors(path: Path) -> None:
    load_recipe(path)
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]
    assert first == "# yaml-language-server: $schema=../recipe.schema.json"
    assert (path.parent / "../recipe.schema.json").is_file()
    assert second.startswith("#"), "say what the recipe needs"


@pytest.mark.parametrize(("reference", "file"), [(False, "recipes/recipe.schema.json"), (True, "docs/recipe.md")])
def test_the_committed_file_is_what_the_command_prints(
    reference: bool, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert schema.run(argparse.Namespace(reference=reference)) == 0
    flag = " --reference" if reference else ""
    assert capsys.readouterr().out == (ROOT / file).read_text(encoding="utf-8"), f"run: finetune schema{flag} > {file}"


def test_the_command_takes_one_flag() -> None:
    parser = argparse.ArgumentParser()
    schema.add_parser(parser.add_subparsers())
    assert parser.parse_args(["schema"]).reference is False
    assert parser.parse_args(["schema", "--reference"]).run is schema.run


@pytest.mark.parametrize(
    ("kind", "function"),
    [("sft", "common_arguments"), ("sft", "sft_config"), ("dpo", "common_arguments"), ("dpo", "dpo_config")],
)
def test_what_a_trainer_is_given_cannot_be_given_again_through_trainer_args(kind: str, function: str) -> None:
    tree = ast.parse((ROOT / "finetune/methods/arguments.py").read_text(encoding="utf-8"))
    (found,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function]
    given, *_nested = [n for n in ast.walk(found) if isinstance(n, ast.Dict)]
    names = {key.value for key in given.keys if isinstance(key, ast.Constant)}
    assert names
    assert names - set(reserved(kind)) == set()
