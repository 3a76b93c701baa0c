"""The formats of the recipe's table, each with the function of its name that reads a row."""

from collections.abc import Callable
from dataclasses import dataclass

from finetune.data.formats import chat, instructions, oasst, preferences
from finetune.data.formats.drafts import Draft
from finetune.data.formats.fields import Fields
from finetune.recipe.row_formats import ROW_FORMATS, RowFormat


@dataclass(frozen=True, kw_only=True)
class Format(RowFormat):
    """A row format that can be read."""

    read: Callable[[Fields], Draft]


_FUNCTIONS = {
    name: function for module in (chat, instructions, oasst, preferences) for name, function in vars(module).items()
}

FORMATS: dict[str, Format] = {name: Format(**vars(each), read=_FUNCTIONS[name]) for name, each in ROW_FORMATS.items()}
