"""A data file -> a data set of token rows and what was counted on the way. All bad rows are reported together."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from datasets import Dataset
from tqdm import tqdm

from finetune.data.conversations import conversation_reader, no_rows, to_conversation
from finetune.data.formats import FORMATS, Reader
from finetune.data.render import IGNORED, Rendered, Renderer, read_template
from finetune.data.rows import Problems, Row, RowError, shown
from finetune.data.sources import open_source
from finetune.data.table import TokenRows
from finetune.data.types import Conversation
from finetune.errors import DataError, Problem
from finetune.recipe import DataSettings, DataSource


@dataclass(frozen=True)
class DataStats:
    """What became of the rows of one file.

    `rows` read = `kept` + `dropped`; `truncated` are among the kept. `tokens` and `supervised_tokens` count the kept
    rows after truncation, `longest` is the longest row of the file in tokens, before it. `sequences` is the length of
    the data set: `kept`, or fewer with packing.
    """

    rows: int
    kept: int
    truncated: int
    dropped: int
    tokens: int
    supervised_tokens: int
    longest: int
    sequences: int

    def as_dict(self) -> dict[str, int]:
        """For the audit file."""
        return asdict(self)


@dataclass(frozen=True)
class Prepared:
    """`dataset` columns: `input_ids`, `labels` (-100: not supervised; NOT shifted), `row` (1-based line number).

    With packing also `position_ids`, and `row` is the list of the packed rows' line numbers.
    """

    dataset: Dataset
    stats: DataStats


@dataclass
class _Pass:
    """One pass over a file: the settings it goes by, what it kept, what it counted."""

    settings: DataSettings
    kept: TokenRows = field(default_factory=TokenRows)
    rows: int = 0
    truncated: int = 0
    longest: int = 0

    def take(self, rendered: Rendered, line: int) -> None:
        """Keep the row, as a whole or cut, or drop it; `RowError` where the settings do not allow its length."""
        length, limit = len(rendered.input_ids), self.settings.max_length
        self.rows += 1
        self.longest = max(self.longest, length)
        if length > limit and self.settings.overlong == "drop":
            return
        if length > limit and self.settings.overlong == "error":
            do = "raise data.max_length, shorten the row, or set data.overlong to truncate or drop"
            raise RowError(None, f"longer than data.max_length = {limit} tokens", do, f"{length} tokens")
        ids, labels = rendered.input_ids[:limit], rendered.labels[:limit]
        if (labels == IGNORED).all():
            # A whole row has at least the EOS of its last answer, so only a cut can get here.
            what = f"cut at data.max_length = {limit} tokens it has no supervised token left"
            raise RowError(None, what, "raise data.max_length, or set data.overlong to drop", f"{length} tokens")
        self.truncated += length > limit
        self.kept.append(ids, labels, line)

    def stats(self, sequences: int) -> DataStats:
        """The counts, as they are reported."""
        return DataStats(
            rows=self.rows,
            kept=len(self.kept.lines),
            truncated=self.truncated,
            dropped=self.rows - len(self.kept.lines),
            tokens=self.kept.tokens,
            supervised_tokens=self.kept.supervised_tokens,
            longest=self.longest,
            sequences=sequences,
        )


def prepare(sources: Sequence[DataSource], tokenizer: Any, settings: DataSettings) -> Prepared:
    """Read, render, tokenise, mark what is supervised, cut or drop what is too long, pack if asked.

    `tokenizer` comes from `load_tokenizer` with `settings.chat_template`. Raises `DataError` with every bad row, each
    as `file:line: field: what; got; do`.
    """
    path, row_format = _one_file(sources, settings)
    renderer = Renderer(tokenizer, _template_name(tokenizer, settings))
    reading, problems, read = _Pass(settings), Problems(), conversation_reader(row_format)
    for line in _with_progress(sources[0]):
        try:
            conversation = to_conversation(line, read)
            reading.take(_rendered(renderer, conversation, line, read), line.number)
        except RowError as error:
            problems.add(line.path, line.number, error)
    problems.raise_if_any()
    _check_not_empty(reading, path)
    kept = reading.kept
    dataset = kept.packed_dataset(settings.max_length) if settings.packing else kept.dataset()
    return Prepared(dataset, reading.stats(len(dataset)))


def _one_file(sources: Sequence[DataSource], settings: DataSettings) -> tuple[str, str]:
    """Path and format of the one file that is read here; `DataError` for settings that would be ignored."""
    source = sources[0]
    path, plain = source.path, DataSettings(train=source, max_length=settings.max_length)
    ignored = [name for name in ("loss_on", "system", "on_bad_row") if getattr(settings, name) != getattr(plain, name)]
    if settings.overlong == "split":
        ignored.append("overlong")
    if path is None or len(sources) > 1 or source != DataSource(path=path, format=source.format):
        ignored.append("train")
    if ignored or path is None or source.format not in FORMATS:
        where = f"data.{ignored[0] if ignored else 'train'}"
        do = f"write one file in one of the formats {', '.join(FORMATS)}, and leave the newer settings out"
        raise DataError(Problem(where=where, what="not read by the data pipeline of this version", do=do))
    return path, source.format


def _rendered(renderer: Renderer, conversation: Conversation, line: Row, read: Reader) -> Rendered:
    further = {key for message in conversation.messages for key in message.keys() - {"role", "content"}}
    if further or conversation.tools:
        got = shown(sorted(further) + ["tools"] * bool(conversation.tools))
        raise RowError(None, "is not rendered by the data pipeline of this version", "leave such rows out", got)
    try:
        rendered = renderer.tokenise([renderer.render(conversation)])[0]
        if isinstance(rendered, RowError):
            raise rendered
        return rendered
    except RowError as error:
        assert isinstance(line.value, dict)
        error.field = read.locate(line.value, error.field)
        raise


def _template_name(tokenizer: Any, settings: DataSettings) -> str:
    if settings.chat_template is None:
        return "the tokenizer's own chat template"
    if tokenizer.chat_template != read_template(settings.chat_template):
        # What is saved beside the adapter must be what was trained.
        do = "load the tokenizer with load_tokenizer(..., chat_template=data.chat_template)"
        what = f"the tokenizer carries another template than {settings.chat_template}"
        raise DataError(Problem(where="data.chat_template", what=what, do=do))
    return f"the chat template {settings.chat_template}"


def _with_progress(settings: DataSource) -> Iterator[Row]:
    source = open_source(settings)
    with tqdm(total=source.total, desc=f"Tokenising {source.name}", unit=source.unit, unit_scale=True) as bar:
        for row in source:
            yield row
            bar.update(row.progress)
        bar.update((source.total or bar.n) - bar.n)  # blank lines


def _check_not_empty(reading: _Pass, path: str) -> None:
    if not reading.rows:
        raise no_rows(path)
    if not reading.kept.lines:
        what = f"every row is longer than data.max_length = {reading.settings.max_length} tokens and was dropped"
        do = f"raise data.max_length: the longest row has {reading.longest} tokens"
        raise DataError(Problem(where=path, what=what, do=do))
