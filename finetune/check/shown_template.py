"""`finetune template`: conversations as a chat template renders them, and what is supervised of each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.check.built_in import CALLS, PARALLEL_CALLS, REASONING, SYSTEM, THREE_TURNS
from finetune.check.samples import Sample, sample_of
from finetune.check.single_row import SingleRow, read_single_row
from finetune.check.template_summary import Fields, TemplateSummary, summarise
from finetune.checkpoint import resolve_checkpoint
from finetune.data.render import LossOn, Marks, RenderedText, Renderer, System
from finetune.data.row_errors import RowError
from finetune.data.tokenizer import load_tokenizer
from finetune.data.types import Conversation, Document

PLAIN_TEXT = "none: the row is plain text, and the loss is on all of it"


@dataclass(frozen=True)
class Choices:
    """The settings of a recipe that decide the text; `chat_template` is None for the tokenizer's own."""

    model: str
    chat_template: str | None = None
    loss_on: LossOn = "assistant"
    system: System = "error"
    template_args: Mapping[str, Any] = field(default_factory=dict)
    added_tokens: tuple[str, ...] = ()
    eos_token: str | None = None

    @property
    def template_name(self) -> str:
        """What messages call the template."""
        own = "the tokenizer's own chat template"
        return own if self.chat_template is None else f"the chat template {self.chat_template}"


@dataclass
class ShownTemplate:
    """A template's summary (None for plain text, which needs none), examples, and what it refuses with the reason."""

    summary: TemplateSummary | None
    samples: list[Sample] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)

    def fields(self) -> Fields:
        """The summary as it is printed."""
        return [("template", PLAIN_TEXT)] if self.summary is None else self.summary.fields()


def show_template(choices: Choices, place: str | None, row_format: str = "auto") -> ShownTemplate:
    """The row at `place` (`FILE:LINE`), or built-in conversations, in the model's chat template.

    Loads the tokenizer and nothing else of the model. Raises what `load_tokenizer` and `read_single_row` raise, and
    `DataError` for a row that the template refuses.
    """
    row = None if place is None else read_single_row(place, row_format)
    tokenizer = load_tokenizer(
        str(resolve_checkpoint(choices.model, weights=False, where="MODEL")),
        None,
        choices.chat_template,
        choices.added_tokens,
        choices.eos_token,
        template_args=choices.template_args,
    )
    if row is not None and isinstance(document := row.texts[0][1], Document):
        renderer = _document_renderer(tokenizer, choices, document)
        return ShownTemplate(None, _row_samples(renderer, tokenizer, row))
    shown = ShownTemplate(summarise(tokenizer, choices.template_name, choices.system))
    renderer = Renderer(tokenizer, choices.template_name, choices.loss_on, choices.system)
    if row is not None:
        shown.samples = _row_samples(renderer, tokenizer, row)
        return shown
    for title, conversation in (("three turns", THREE_TURNS), ("a call of a tool", CALLS), ("reasoning", REASONING)):
        try:
            shown.samples += _samples(renderer, tokenizer, title, conversation)
        except RowError as error:
            shown.refused.append((title, _reason(error)))
    for title, conversation in (("a system message", SYSTEM), ("calls in parallel", PARALLEL_CALLS)):
        try:
            renderer.render(conversation)
        except RowError as error:
            shown.refused.append((title, _reason(error)))
    return shown


def _document_renderer(tokenizer: Any, choices: Choices, document: Document) -> Renderer | RenderedText:
    if document.rendered:
        return RenderedText(tokenizer, "all", Marks(None, None))
    return Renderer(tokenizer, choices.template_name, "all", choices.system)


def _row_samples(renderer: Renderer | RenderedText, tokenizer: Any, row: SingleRow) -> list[Sample]:
    samples = []
    for index, (title, text) in enumerate(row.texts):
        try:
            samples += _samples(renderer, tokenizer, title, text)
        except RowError as error:
            raise row.refusal(index, error) from error
    return samples


def _samples(
    renderer: Renderer | RenderedText, tokenizer: Any, title: str, text: Conversation | Document
) -> Iterator[Sample]:
    """The examples that a conversation is trained as; `RowError` where it cannot be."""
    renderings = [renderer.render(text)]
    for number, tokens in enumerate(renderer.tokenise(renderings), start=1):
        if isinstance(tokens, RowError):
            raise tokens
        where = title if len(renderings) == 1 else f"{title}, example {number} of {len(renderings)}"
        yield sample_of(where, tokens.input_ids, tokens.labels, tokenizer)


def _reason(error: RowError) -> str:
    got = "" if error.got is None else f"; got {error.got}"
    return f"{error.what}{got}; {error.do}"
