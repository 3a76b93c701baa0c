"""A recipe file and overrides -> a `Recipe`, or one RecipeError with every problem, before torch is imported."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path as FilePath

import yaml
from pydantic import ValidationError

from finetune.recipe.checks import check_all
from finetune.recipe.error_messages import report_invalid
from finetune.recipe.schema import settings
from finetune.recipe.settings import Recipe
from finetune.recipe.source import Source, read_source
from finetune.recipe.yaml import resolve


def load_recipe(path: str | PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read, override (`key.path=value`) and validate a recipe. Raises RecipeError with all problems at once."""
    source = read_source(FilePath(path), overrides)
    source.check_values()
    _fill_empty_sections(source)
    recipe = None
    try:
        recipe = Recipe.model_validate(source.values)
    except ValidationError as error:
        # The input is shown from the source, as typed.
        for detail in error.errors(include_url=False, include_context=False):
            report_invalid(source, detail["type"], detail["loc"])
    check_all(source)
    source.raise_problems()
    if recipe is None:  # pragma: no cover - every ValidationError reports at least one problem
        raise AssertionError("an invalid recipe without a problem")
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every setting written out; `load_recipe` reads the same recipe back."""
    return yaml.dump(recipe.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.2 would read as another type, such as 2e-4 or 0o17; writes no anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds U+0085 and similar characters into a space unless they are escaped, which needs double quotes.
    style = None if isinstance(resolve(text), str) and text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _fill_empty_sections(source: Source) -> None:
    """A section whose keys are all commented out is an empty section, not a null."""
    for key, setting in settings().items():
        path = tuple(key.split("."))
        around = source.get(path[:-1])
        if not setting.section or setting.nullable or not isinstance(around, dict) or source.is_broken(path):
            continue
        if path[-1] in around and around[path[-1]] is None:
            around[path[-1]] = {}
