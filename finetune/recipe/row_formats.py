"""The table of row formats: names and fields, for the recipe, the command line and the readers.

A new format is a line here, a parser of its name in `finetune/data/formats/format_parsers.py`, and a file of its name
in `data/examples/`. Hub ids are told from paths by their form alone, without a file or network access.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

Role = Literal["system", "user", "assistant", "tool"]
Gives = Literal["conversation", "document", "preference", "judged"]

REASONING = "reasoning"
"""Field of the formats with one column for the answer: what was reasoned before it."""

_ALIASES: Mapping[str, tuple[str, ...]] = {
    "conversations": ("conversation",),
    "tools": ("functions",),
    "system": ("system_prompt",),
}


@dataclass(frozen=True)
class RowFormat:
    """One row format: the kind of example that it gives, and its fields.

    `aliases`: {field: other names that files use for it}. `recognised`: `format: auto` may choose it.
    """

    name: str
    gives: Gives
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _ALIASES)
    recognised: bool = True

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields that `columns` may map."""
        return self.required + self.optional


_QUESTION = {**_ALIASES, "prompt": ("query", "question"), "completion": ("response", "answer")}
_BESIDE = ("system", "history", "tools", REASONING)
_SCORES = ("score_chosen", "score_rejected")

_TABLE = (
    RowFormat("messages", "conversation", ("messages",), ("tools",)),
    RowFormat("sharegpt", "conversation", ("conversations",), ("system", "tools")),
    RowFormat("alpaca", "conversation", ("instruction", "output"), ("input", "system", "history", REASONING)),
    RowFormat("prompt_completion", "conversation", ("prompt", "completion"), _BESIDE, _QUESTION),
    RowFormat("dolly", "conversation", ("instruction", "response"), ("context", REASONING)),
    RowFormat("oasst", "conversation", ("prompt",)),
    RowFormat("text", "document", ("text",)),
    RowFormat("rendered", "document", ("text",), recognised=False),
    RowFormat("preference", "preference", ("chosen", "rejected"), ("prompt", "tools")),
    RowFormat("ultrafeedback", "preference", ("prompt", "chosen", "rejected", *_SCORES)),
    RowFormat("alpaca_dpo", "preference", ("instruction", "chosen", "rejected"), ("input", "system", "history")),
    RowFormat("hh", "preference", ("chosen", "rejected")),
    RowFormat("orca_dpo", "preference", ("question", "chosen", "rejected"), ("system",)),
    RowFormat("sharegpt_dpo", "preference", ("conversations", "chosen", "rejected"), ("system", "tools")),
    RowFormat("kto", "judged", ("prompt", "completion", "label"), ("system", "history"), _QUESTION),
)

ROW_FORMATS: dict[str, RowFormat] = {row_format.name: row_format for row_format in _TABLE}
CONVERSATION_FORMATS = tuple(name for name, row_format in ROW_FORMATS.items() if row_format.gives == "conversation")
MESSAGE_FORMATS = tuple(
    name for name in ROW_FORMATS if name not in ("alpaca", "dolly", "oasst", "text", "rendered", "hh", "orca_dpo")
)
"""Formats in which messages may name their roles in words of the file."""
PAIR_FORMATS = tuple(name for name, row_format in ROW_FORMATS.items() if row_format.gives in ("preference", "judged"))

if TYPE_CHECKING:
    FormatName = str
else:
    # mypy does not run this, so it cannot know the names.
    FormatName = Literal[("auto", *ROW_FORMATS)]


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HUB_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(?:[^\s]*/)?datasets/([\w.-]+/[\w.-]+)")


def is_hub_id(name: str) -> bool:
    """True for `owner/name`."""
    return _HUB_ID.fullmatch(name) is not None


def looks_like_hub_id(path: str) -> bool:
    """True for a path that may be meant as `owner/name`: for messages about paths that do not exist."""
    return is_hub_id(path) and not path.lower().endswith(_ENDINGS)


def looks_like_path(name: str) -> bool:
    """True for a name that can only be meant as a path of files."""
    return name.startswith((".", "/", "~")) or name.lower().endswith(_ENDINGS) or any(c in name for c in "\\*?[")


def is_url(name: str) -> bool:
    """True for `scheme://...`."""
    return _URL.match(name) is not None


def hub_id_in_url(url: str) -> str | None:
    """`owner/name` of the address of a hub data set; None for other addresses."""
    match = _HUB_URL.match(url)
    return match[1] if match else None
