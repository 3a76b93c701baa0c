"""An example -> text with its supervised places -> token ids and labels, through the tokenizer's chat template."""

from finetune.data.render.chat import ChatTemplate, System
from finetune.data.render.renderer import LOSSES, Renderer
from finetune.data.render.rendering import IGNORED, Answer, LossOn, Rendered, Rendering
from finetune.data.render.templates import SHIPPED, read_template

__all__ = [
    "IGNORED",
    "LOSSES",
    "SHIPPED",
    "Answer",
    "ChatTemplate",
    "LossOn",
    "Rendered",
    "Renderer",
    "Rendering",
    "System",
    "read_template",
]
