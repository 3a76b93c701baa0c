"""An example -> text with its supervised places -> token ids and labels, through the tokenizer's chat template."""

from finetune.data.render.chat_template import ChatTemplate, System
from finetune.data.render.compiled_template import SHIPPED, read_template
from finetune.data.render.rendered_text import Marks, RenderedText
from finetune.data.render.renderer import LOSSES, Renderer
from finetune.data.render.sandbox import StoppedError
from finetune.data.render.template_settings import (
    set_stop_tokens,
    set_template_args,
    set_template_day,
    stop_tokens,
    template_args,
    template_day,
)
from finetune.data.types import IGNORED, Answer, Rendering, TokenizedText
from finetune.recipe.settings import LossOn

__all__ = [
    "IGNORED",
    "LOSSES",
    "SHIPPED",
    "Answer",
    "ChatTemplate",
    "LossOn",
    "Marks",
    "RenderedText",
    "Renderer",
    "Rendering",
    "StoppedError",
    "System",
    "TokenizedText",
    "read_template",
    "set_stop_tokens",
    "set_template_args",
    "set_template_day",
    "stop_tokens",
    "template_args",
    "template_day",
]
