"""The table of row formats. A new one is a function, a line here and a file in `data/examples/` of its name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from finetune.data.formats.chat import messages, sharegpt
from finetune.data.formats.drafts import Draft
from finetune.data.formats.fields import Fields
from finetune.data.formats.instructions import alpaca, dolly, prompt_completion, text
from finetune.data.formats.oasst import oasst
from finetune.data.formats.preferences import hh, kto, orca_dpo, preference, sharegpt_dpo, ultrafeedback

Gives = Literal["conversation", "document", "preference", "judged"]


@dataclass(frozen=True)
class Format:
    """One row format: which kind of example it gives, its fields, and the function that reads a row.

    `aliases`: {field: another name that files use for it}.
    """

    name: str
    gives: Gives
    read: Callable[[Fields], Draft]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields that `columns` may map."""
        return self.required + self.optional


EITHER = {"conversations": "conversation"}

_TABLE = (
    Format("messages", "conversation", messages, ("messages",), ("tools",)),
    Format("sharegpt", "conversation", sharegpt, ("conversations",), ("system", "tools"), EITHER),
    Format("alpaca", "conversation", alpaca, ("instruction", "output"), ("input", "system", "history")),
    Format("prompt_completion", "conversation", prompt_completion, ("prompt", "completion")),
    Format("dolly", "conversation", dolly, ("instruction", "response"), ("context",)),
    Format("oasst", "conversation", oasst, ("prompt",)),
    Format("text", "document", text, ("text",)),
    Format("preference", "preference", preference, ("chosen", "rejected"), ("prompt", "tools")),
    Format(
        "ultrafeedback",
        "preference",
        ultrafeedback,
        ("prompt", "chosen", "rejected", "score_chosen", "score_rejected"),
    ),
    Format("hh", "preference", hh, ("chosen", "rejected")),
    Format("orca_dpo", "preference", orca_dpo, ("question", "chosen", "rejected"), ("system",)),
    Format(
        "sharegpt_dpo",
        "preference",
        sharegpt_dpo,
        ("conversations", "chosen", "rejected"),
        ("system", "tools"),
        EITHER,
    ),
    Format("kto", "judged", kto, ("prompt", "completion", "label")),
)

FORMATS: dict[str, Format] = {each.name: each for each in _TABLE}
