"""What a chat template puts around an answer: what opens and ends it, and which of its words the model must write."""

import re
from dataclasses import dataclass
from typing import Any

from finetune.check.samples import Piece, shown
from finetune.data.render import ChatTemplate, Renderer, template_day
from finetune.data.render.chat_template import PROBE_TURNS
from finetune.data.render.ends import common_length
from finetune.data.types import Conversation

Fields = list[tuple[str, str]]
_MARK = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True)
class TemplateSummary:
    """The texts around an answer without reasoning, as the template writes them in one question and its answer.

    `opens`: the end of the generation prompt, which is not supervised. `header`: what the model must write before the
    answer's text, and `ends` behind it, both supervised. `rest`: what the template writes after that, not supervised.
    `call_ends`: the token that ends a call of a tool, where that is another one. `variables`: the names that the
    template reads, with the recipe's values; `day`: the date that it writes; `reasoning_key`: the key of a message that
    it reads reasoning from; `opened`: the block that the prompt opens, unless `closing_arg` is among the variables.
    `marks`: how the mask of the template's own `{% generation %}` marks compares, if it has any.
    """

    opens: str
    header: str
    ends: str
    rest: str
    call_ends: str | None
    variables: tuple[tuple[str, Any], ...]
    day: str | None
    reasoning_key: str | None
    opened: str
    closing_arg: str | None
    marks: str | None = None

    def fields(self, all_supervised: bool = False) -> Fields:
        """As they are printed; `all_supervised`: the loss is on all of it, and nothing is said of what it is on."""
        ends = (
            visible(self.ends) if self.call_ends is None else f"{visible(self.ends)}; a call: {visible(self.call_ends)}"
        )
        parts = [
            ("opens", visible(self.opens), "not supervised: the generation prompt ends with it"),
            ("header", visible(self.header), "supervised: the model writes it before the answer"),
            ("ends", ends, "supervised"),
            ("after", visible(self.rest), "not supervised"),
        ]
        return [(name, text if all_supervised else f"{text} ({note})") for name, text, note in parts if text]

    def details(self) -> Fields:
        """The variables and the reasoning that the template reads."""
        given = ", ".join(f"{name} = {written(value)}" for name, value in self.variables if value is not None)
        unset = ", ".join(name for name, value in self.variables if value is None)
        variables = "; ".join(filter(None, [given, unset and f"not set: {unset}"]))
        day = [] if self.day is None else [("day", f"{self.day}: the template writes the date")]
        marks = [] if self.marks is None else [("marks", self.marks)]
        return [("variables", variables or "none"), *day, ("reasoning", self._reasoning()), *marks]

    def _reasoning(self) -> str:
        if self.opened:
            offer = f"; data.template_args: {{{self.closing_arg}}} opens none" if self.closing_arg else ""
            return f"written into {visible(self.opened)}, which the generation prompt opens{offer}"
        if self.reasoning_key is not None:
            return f"given to the template as {self.reasoning_key}"
        return "not read: a reasoning field is refused, a <think> block is text"


def visible(text: str) -> str:
    """A text on one line: line ends, spaces at its borders and control characters are shown."""
    return shown([Piece(text, (), False)])[0].replace("\n", "")


def written(value: Any) -> str:
    """The value of a variable as a recipe has it."""
    return str(value).lower() if isinstance(value, bool) else visible(str(value))


def summarise(renderer: Renderer, tokenizer: Any) -> TemplateSummary:
    """The summary of the chat template of `tokenizer`, with which `renderer` renders rows."""
    chat = renderer.chat
    question, answer = PROBE_TURNS
    rendering = renderer.examples(Conversation([question, answer]))[-1]
    place = rendering.answers[-1]
    header, _, ends = rendering.text[place.start : place.end].rpartition(answer["content"])
    call_end = chat.call_end
    closing = chat.closing_arg
    return TemplateSummary(
        opens=_generation_prompt(chat),
        header=header,
        ends=ends,
        rest=rendering.text[place.end :],
        call_ends=call_end.token if call_end is not None and call_end.token not in ends else None,
        variables=tuple((name, chat.args.get(name)) for name in chat.variables),
        day=template_day(tokenizer),
        reasoning_key=chat.reasoning_key,
        opened=chat.opened,
        closing_arg=None if closing is None else str(closing),
        marks=_marks(tokenizer, chat, rendering.text[place.start : place.end]),
    )


def _marks(tokenizer: Any, chat: ChatTemplate, answer: str) -> str | None:
    """How what the template's own marks supervise compares with `answer`; None where it has no marks."""
    if not _MARK.search(str(tokenizer.chat_template)):
        return None
    options = {**chat.args, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = tokenizer.apply_chat_template(list(PROBE_TURNS), **options)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    marked = tokenizer.decode([token for token, inside in zip(ids, mask, strict=True) if inside])
    if marked == answer:
        return "the template's {% generation %} marks give the same mask"
    return f"not used: the template's {{% generation %}} marks supervise {visible(marked)}"


def _generation_prompt(chat: ChatTemplate) -> str:
    """What the template adds to make the model answer; what follows the question where it adds nothing."""
    question = PROBE_TURNS[0]
    prompt = chat.text([question], generation=True)
    start = common_length(prompt, chat.text([question]))
    for token in chat.control:
        if (place := prompt.rfind(token, 0, start + len(token) - 1)) >= 0 and place + len(token) > start:
            start = place  # a token that begins as another one
            break
    return prompt[start:] or prompt.rpartition(question["content"])[2]
