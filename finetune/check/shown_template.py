"""`finetune template`: conversations as a chat template renders them, and what is supervised of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.adapters.lineage import trained_template
from finetune.check.built_in import CALL, SHOWN, TRIED, TWO_CALLS
from finetune.check.samples import Sample, sample_of
from finetune.check.single_row import SingleRow, read_single_row
from finetune.check.template_summary import Fields, TemplateSummary, summarise
from finetune.checkpoint import resolve_checkpoint
from finetune.data.render import LossOn, Marks, RenderedText, Renderer, System, set_template_day
from finetune.data.row_errors import RowError
from finetune.data.tokenizer import load_tokenizer
from finetune.data.tokens.examples import TextRenderer
from finetune.data.types import Document, Rendering

PLAIN_TEXT = "none: the row is plain text, and the loss is on all of it"
REWRITES = "because the template rewrites earlier answers"


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
    """A template's summary (None for plain text, which needs none), examples, and what it refuses with the reason.

    `counts`: each conversation with the number of examples that it became.
    """

    summary: TemplateSummary | None
    loss_on: LossOn = "all"
    counts: dict[str, int] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)

    def fields(self) -> Fields:
        """The summary as it is printed."""
        if self.summary is None:
            return [("template", PLAIN_TEXT)]
        split = [f"{title}: {count}, {REWRITES}" for title, count in self.counts.items() if count > 1]
        whole = "one of each conversation" if len(self.counts) > 1 else "one"
        frame = self.summary.fields(self.loss_on == "all")
        return [*frame, ("examples", "; ".join(split) or whole), *self.summary.details()]


def show_template(choices: Choices, place: str | None, row_format: str = "auto") -> ShownTemplate:
    """The row at `place` (`FILE:LINE`), or built-in conversations, in the model's chat template.

    Loads the tokenizer and nothing else of the model; the variables and the day that a trained model records are used.
    Raises what `load_tokenizer` and `read_single_row` raise, and
    `DataError` for a row that the template refuses.
    """
    row = None if place is None else read_single_row(place, row_format)
    folder = resolve_checkpoint(choices.model, weights=False, where="MODEL")
    trained = None if choices.chat_template else trained_template(folder)
    tokenizer = load_tokenizer(
        str(folder),
        None,
        choices.chat_template,
        choices.added_tokens,
        choices.eos_token,
        template_args={**(trained.args if trained else {}), **choices.template_args},
    )
    if trained is not None:
        set_template_day(tokenizer, trained.day)
    if row is not None and isinstance(document := row.texts[0][1], Document):
        shown = ShownTemplate(None)
        _add_row(shown, _document_renderer(tokenizer, choices, document), tokenizer, row)
        return shown
    renderer = Renderer(tokenizer, choices.template_name, choices.loss_on, choices.system)
    shown = ShownTemplate(summarise(renderer, tokenizer), choices.loss_on)
    if row is None:
        _add_built_in(shown, renderer, tokenizer)
    else:
        _add_row(shown, renderer, tokenizer, row)
    return shown


def _document_renderer(tokenizer: Any, choices: Choices, document: Document) -> TextRenderer:
    if document.rendered:
        return RenderedText(tokenizer, "all", Marks(None, None))
    return Renderer(tokenizer, choices.template_name, "all", choices.system)


def _add_row(shown: ShownTemplate, renderer: TextRenderer, tokenizer: Any, row: SingleRow) -> None:
    for index, (title, text) in enumerate(row.texts):
        try:
            _add(shown, renderer, tokenizer, title, row.example_type.renderings(renderer, text))
        except RowError as error:
            raise row.refusal(index, error) from error


def _add_built_in(shown: ShownTemplate, renderer: Renderer, tokenizer: Any) -> None:
    for title, conversation in SHOWN.items():
        try:
            _add(shown, renderer, tokenizer, title, renderer.examples(conversation))
        except RowError as error:
            shown.refused.append((title, _reason(error)))
    for title, conversation in TRIED.items():
        if title == TWO_CALLS and any(refused == CALL for refused, _ in shown.refused):
            continue
        try:
            renderer.examples(conversation)
        except RowError as error:
            shown.refused.append((title, _reason(error)))


def _add(
    shown: ShownTemplate, renderer: TextRenderer, tokenizer: Any, title: str, renderings: Sequence[Rendering]
) -> None:
    """The examples that a conversation is trained as; `RowError` where the tokens of one cannot be."""
    shown.counts[title] = len(renderings)
    for number, tokens in enumerate(renderer.tokenise(renderings), start=1):
        if isinstance(tokens, RowError):
            raise tokens
        where = title if len(renderings) == 1 else f"{title}, example {number} of {len(renderings)}"
        shown.samples.append(sample_of(where, tokens.input_ids, tokens.labels, tokenizer))


def _reason(error: RowError) -> str:
    got = "" if error.got is None else f"; got {error.got}"
    return f"{error.what}{got}; {error.do}"
