"""What the user is told where the generation prompt opens a block of reasoning and answers have none."""

from collections.abc import Mapping
from typing import Any

from finetune.data.formats import FORMATS
from finetune.data.render import ChatTemplate
from finetune.data.tokens.stats import DataStats, counted
from finetune.recipe import DataSettings


def reasoning_remarks(tokenizer: Any, settings: DataSettings, stats: Mapping[str, DataStats]) -> list[str]:
    """A sentence for each split with answers that the model learns to begin by closing the block that was opened.

    It offers the variable with which the prompt opens none, where the template has one.
    """
    counts = {name: _without_reasoning(split) for name, split in stats.items()}
    if not any(counts.values()) or not tokenizer.chat_template:
        return []
    chat = ChatTemplate(tokenizer, "the chat template", settings.system)
    if not chat.opened:
        return []
    opened = chat.opened.strip()
    offer = ""
    if chat.closing_arg is not None:
        offer = f"; data.template_args: {{{chat.closing_arg}}} gives a prompt without an open block"
    return [
        f"{name}: {counted(count, 'answer')} without reasoning, and the generation prompt opens "
        f"{opened}: the model learns to close the block at once{offer}"
        for name, count in counts.items()
        if count
    ]


def _without_reasoning(stats: DataStats) -> int:
    """Supervised answers without reasoning in the sets that the chat template renders."""
    sources = (data_set.source for data_set in stats.sets)
    return sum(source.without_reasoning for source in sources if FORMATS[source.format].gives != "document")
