"""The table of formats: its names are the recipe's and the command line's, its lines stand in the documentation."""

import ast
from pathlib import Path
from types import FunctionType

import pytest

from finetune.cli.main import build_parser
from finetune.data.formats import FORMATS
from finetune.recipe.row_formats import CONVERSATION_FORMATS
from finetune.recipe.schema import settings
from tests.row_formats import EXAMPLES

PACKAGE = Path(__file__).parents[2] / "finetune" / "data" / "formats"
LIGHT = (
    "finetune.data.row_errors",
    "finetune.data.types",
    "finetune.data.formats",
    "finetune.errors",
    "finetune.recipe.row_formats",
)


def test_the_recipe_takes_every_format_of_the_table_and_auto() -> None:
    format_of_recipe = settings()["data.train.format"].expects
    assert format_of_recipe == "one of " + ", ".join(["auto", *FORMATS])


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_read_by_the_function_of_its_name(name: str) -> None:
    function = FORMATS[name].read
    assert isinstance(function, FunctionType)
    assert function.__name__ == name


@pytest.mark.parametrize("row_format", CONVERSATION_FORMATS)
def test_evaluate_takes_every_format_of_conversations(row_format: str) -> None:
    args = build_parser().parse_args(["evaluate", "model", "--data", "rows.jsonl", "--format", row_format])
    assert args.format == row_format


def test_each_format_has_one_example_file_and_a_line_in_the_data_folders_readme() -> None:
    assert {path.name for path in EXAMPLES.iterdir()} == {f"{name}.jsonl" for name in FORMATS}
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    assert [name for name in FORMATS if f"| `{name}.jsonl` |" not in readme] == []


def test_formats_import_nothing_heavy() -> None:
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            heavy = [name for name in names if name.split(".")[0] in ("torch", "transformers", "datasets", "numpy")]
            ours = [name for name in names if name.startswith("finetune") and not name.startswith(LIGHT)]
            assert heavy + ours == [], path.name
