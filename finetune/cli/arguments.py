"""Types of arguments that several commands take."""

import argparse

from finetune.recipe.yaml import resolve


def variable(text: str) -> tuple[str, bool | int | float | str]:
    """Name and value of a template's variable, `NAME=VALUE`, the value written as in a recipe."""
    name, _, value = text.partition("=")
    resolved = resolve(value)
    if not name or not isinstance(resolved, bool | int | float | str):
        raise argparse.ArgumentTypeError(f"write NAME=VALUE, a value being text, a number, true or false; got {text}")
    return name, resolved
