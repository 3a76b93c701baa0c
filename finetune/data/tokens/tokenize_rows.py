"""One source -> its token rows in the cache, with everything that was counted on the way.

Rows are tokenised in order and in bounded memory: while one chunk is tokenised the next is read and rendered. The
tokenizer is Rust, spreads a chunk over all cores and releases the GIL. Two threads beside this one are enough: the
Python work after the tokens of one chunk is done while the next chunk is tokenised. The result cannot depend on how
many cores there are.
"""

import hashlib
import json
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from finetune.data.formats import SAMPLE_ROWS, reader, recognise
from finetune.data.formats.fields import PLACEHOLDERS
from finetune.data.render import StoppedError
from finetune.data.row_errors import FileError, Problems, Row, RowError
from finetune.data.row_size import check_characters, weight
from finetune.data.sources import Source, open_source
from finetune.data.tokens.cache import Seen, TokenTable, Writer, digest, entry, rows_fingerprint
from finetune.data.tokens.examples import Example, ExampleType, RowProblem, TextRenderer, place_of
from finetune.data.tokens.stats import NAMED, RowStats
from finetune.data.tokens.truncation import TooLongError
from finetune.data.types import Ints, Rendering, TokenizedText, TokenPair, contents_of
from finetune.errors import DataError, Problem, printable
from finetune.recipe import DataSettings, DataSource

CHUNK_ROWS = 512
CHUNK_CHARACTERS = 1 << 19
_TOKENISERS = 2
_HELD = 8 * CHUNK_CHARACTERS  # characters of all columns
_RENDERED = 4  # so many times the characters of a row may its texts have: templates add marks, and repeat turns
_AHEAD = 3  # chunks that wait for the tokenizer; more would only hold memory


def tokenised(
    examples: Iterable[Example], example_type: ExampleType, renderer: TextRenderer, max_characters: int
) -> Iterator[Example]:
    """Every example, in order, with its texts and tokens or its problem; none of more than `max_characters`."""
    large = Lock()  # two of the largest texts at a time would take twice the memory
    waiting: deque[tuple[list[Example], Future[list[TokenizedText | RowError]]]] = deque()
    with ThreadPoolExecutor(_TOKENISERS, thread_name_prefix="tokeniser") as pool:
        for chunk in _rendered_chunks(examples, example_type, renderer, max_characters):
            texts = [text for example in chunk for text in example.texts]
            one_by_one = large if any(len(text.text) > CHUNK_CHARACTERS for text in texts) else nullcontext()
            waiting.append((chunk, pool.submit(_tokenise, renderer, texts, one_by_one)))
            if len(waiting) > _AHEAD:
                yield from _with_tokens(*waiting.popleft(), example_type)
        while waiting:
            yield from _with_tokens(*waiting.popleft(), example_type)


def _tokenise(
    renderer: TextRenderer, texts: Sequence[Rendering], one_by_one: AbstractContextManager[Any]
) -> list[TokenizedText | RowError]:
    with one_by_one:
        return renderer.tokenise(texts)


def _rendered_chunks(
    examples: Iterable[Example], example_type: ExampleType, renderer: TextRenderer, max_characters: int
) -> Iterator[list[Example]]:
    chunk: list[Example] = []
    characters = held = 0
    for example in examples:
        goes_on = _render(example, example_type, renderer, max_characters)
        chunk.append(example)
        if not goes_on:
            break
        characters += sum(len(text.text) for text in example.texts)
        held += sum(weight(row.value) for row in example.rows)  # columns that are not read are held, too
        if len(chunk) == CHUNK_ROWS or characters > CHUNK_CHARACTERS or held > _HELD:
            yield chunk
            chunk, characters, held = [], 0, 0
    if chunk:
        yield chunk


def _render(example: Example, example_type: ExampleType, renderer: TextRenderer, max_characters: int) -> bool:
    """Set the texts of an example, or its problem; False where the rows behind it could take as long to fail."""
    if example.content is None:
        return True
    try:
        check_characters(example.content, max_characters)
        conversations = example_type.conversations(example.content)
    except RowError as error:
        example.fail(error)
        return True
    texts: list[Rendering] = []
    for index, conversation in enumerate(conversations):
        try:
            texts += example_type.renderings(renderer, conversation)
        except StoppedError as error:
            example.fail(error.of_row)
            return False
        except RowError as error:
            error.field = example_type.locate(example.content, index, error.field)
            example.fail(error)
            return True
    if (characters := sum(len(text.text) for text in texts)) > _RENDERED * max_characters:
        what = f"{characters:,} characters as the chat template writes it ({len(texts):,} texts): above {_RENDERED} x "
        do = "shorten the row, or name another one in data.chat_template"
        example.fail(RowError(None, f"{what}data.max_row_characters = {max_characters:,}", do))
        return True
    example.texts = tuple(texts)
    return True


def _with_tokens(
    chunk: list[Example], future: Future[list[TokenizedText | RowError]], example_type: ExampleType
) -> Iterator[Example]:
    results = iter(future.result())
    for example in chunk:
        _take_tokens(example, list(islice(results, len(example.texts))), example_type)
        yield example


def _take_tokens(example: Example, results: Sequence[TokenizedText | RowError], example_type: ExampleType) -> None:
    """Set the tokens of all texts, or the problem of the first that has none."""
    tokens = []
    for index, result in enumerate(results):
        if isinstance(result, RowError):
            assert example.content is not None
            result.field = example_type.locate(example.content, index, result.field)
            example.fail(result)
            return
        tokens.append(result)
    example.tokens = tuple(tokens)


@dataclass(frozen=True)
class RowSet:
    """Prepared rows (or pairs) of one source: `lengths` and `supervised` are tokens of each that is kept, int32."""

    name: str
    folder: Path
    stats: RowStats
    lengths: Ints
    supervised: Ints
    content: str  # fingerprint of the source's rows, before they are tokenised

    def dataset(self) -> Dataset:
        """The columns of the example type's schema, memory-mapped."""
        return Dataset.from_file(str(self.folder / "rows.arrow"))

    def table(self) -> TokenTable:
        """The same rows for reading one by one."""
        return TokenTable(self.folder / "rows.arrow")


def prepare_rows(
    source: DataSource,
    tokenizer: Any,
    settings: DataSettings,
    renderer: TextRenderer,
    max_problems: int,
    example_type: ExampleType,
) -> RowSet:
    """The tokens of one source, as examples of this type; from the cache if nothing that they depend on has changed.

    Raises `DataError` with the bad rows, the first `max_problems` of them named, where the settings do not drop them.
    """
    opened = open_source(source)
    content = opened.fingerprint()
    parts = rows_fingerprint(opened.paths, content, source, settings, tokenizer, example_type.name)

    def write(folder: Path) -> None:
        _Pass(source, settings, renderer, example_type, Problems(max_problems)).write(opened, folder)
        if opened.fingerprint() != content:
            do = "run again when no process writes to it"
            raise DataError(Problem(opened.name, "changed while it was read", do))

    folder = entry(f"rows-{digest(parts)}", write)
    stats = RowStats.from_json(json.loads((folder / "stats.json").read_text(encoding="utf-8")))
    lengths, supervised = (np.load(folder / f"{name}.npy") for name in ("lengths", "supervised"))
    return RowSet(opened.name, folder, stats, lengths, supervised, content)


@dataclass
class _Pass:
    """One pass over a source: the settings it goes by and what it counted."""

    source: DataSource
    settings: DataSettings
    renderer: TextRenderer
    example_type: ExampleType
    problems: Problems
    stats: RowStats = field(default_factory=RowStats)
    lengths: "array[int]" = field(default_factory=lambda: array("i"))
    supervised: "array[int]" = field(default_factory=lambda: array("i"))
    written: Any = field(default_factory=hashlib.sha256)  # SHA-256 of the tokens and labels
    broken: bool = False  # something that no setting drops

    def write(self, source: Source, folder: Path) -> None:
        """Read all of it; write `rows.arrow`, lengths and stats into the folder."""
        rows = self._recognised(islice(_with_progress(source), self.source.max_rows), source.name)
        examples = self.example_type.examples(
            rows, reader(self.stats.format, self.source.columns, self.source.ignore_columns, self.source.roles)
        )
        with Writer(folder / "rows.arrow", self.example_type.schema) as writer, Seen() as texts, Seen() as ids:
            for example in tokenised(examples, self.example_type, self.renderer, self.settings.max_row_characters):
                self._add(example, writer, texts, ids)
        self._check_usable(source.name)
        for name, values in (("lengths", self.lengths), ("supervised", self.supervised)):
            np.save(folder / f"{name}.npy", np.asarray(values))
        self.stats.digest = self.written.hexdigest()
        stats = json.dumps(self.stats.as_json(), ensure_ascii=False)
        (folder / "stats.json").write_text(stats, encoding="utf-8")

    def _recognised(self, rows: Iterator[Row], name: str) -> Iterator[Row]:
        """The rows again, after `stats.format` is known."""
        self.stats.format = self.source.format
        if self.source.format != "auto":
            return rows
        first = _first(rows)
        try:
            recognition = recognise((row.value for row in first), self.source.columns, self.source.roles)
        except RowError as error:
            for row in first:
                if isinstance(row.value, RowError):
                    self.problems.add(row.path, row.number, row.value)
            problem = error.problem(name, 0) if first else _no_row(name)
            raise DataError([*self.problems.report(), problem]) from error
        self.stats.format, self.stats.why = recognition.format, recognition.why
        return chain(first, rows)

    def _add(self, example: Example, writer: Writer, texts: Seen, ids: Seen) -> None:
        """Write the rows of an example, or report its problem."""
        where, rows = example.where, len(example.rows)
        self.stats.rows += rows
        pieces = self._fit(example, ids)
        if example.problem is not None:
            self._report(example, example.problem)
            return
        if pieces:
            self._count_examples(example)
        for piece in pieces:
            writer.append(*piece.columns, where)
            for column in piece.columns:
                self.written.update(column.tobytes())
            self.lengths.append(piece.tokens)
            self.supervised.append(piece.supervised)
            self.stats.pieces += 1
            self.stats.tokens += piece.tokens
            self.stats.supervised_tokens += piece.supervised
        if pieces and (first := texts.first("\0".join(text.text for text in example.texts), where)):
            self.stats.count_duplicate(where, first, rows)
        if pieces and example.content is not None and not PLACEHOLDERS.isdisjoint(contents_of(example.content)):
            self.stats.placeholders += rows

    def _count_examples(self, example: Example) -> None:
        """Count what a conversation became where its answers are learned one by one."""
        self.stats.without_reasoning += sum(
            answer.reasoning is None for text in example.texts for answer in text.answers
        )
        if self.example_type.splits and len(example.texts) > 1:
            self.stats.split_conversations += 1
            self.stats.split_examples += len(example.texts) - example.left_out
            self.stats.examples_left_out += example.left_out

    def _fit(self, example: Example, ids: Seen) -> Sequence[TokenizedText | TokenPair]:
        """The rows of an example that are written, counted; none if it has a problem, which is set."""
        if example.problem is not None:
            return []
        for row in example.rows:
            if (repeated := _same_id(row, ids)) is not None:
                example.problem = RowProblem(row, repeated)
                return []
        try:
            pieces = self.example_type.fit(example, self.settings)
        except RowError as error:
            example.fail(error)
            return []
        length = max(text.tokens for text in example.tokens)
        self.stats.count_length(length, example.where)
        too_long, rows = length > self.settings.max_length, len(example.rows)
        self.stats.dropped += 0 if pieces else rows
        self.stats.truncated += rows if too_long and self.settings.overlong == "truncate" else 0
        if too_long and self.settings.overlong == "split":
            self.stats.split += 1
            cut = sum(-(-text.tokens // self.settings.max_length) for text in example.tokens)
            self.stats.pieces_left_out += cut - len(pieces)
        return pieces

    def _report(self, example: Example, problem: RowProblem) -> None:
        self.problems.add(problem.row.path, problem.row.number, problem.error)
        if self.settings.on_bad_row == "error" or isinstance(problem.error, FileError | TooLongError):
            self.broken = True
            return
        for row, error in example.row_problems():
            self.stats.bad += 1
            if len(self.stats.bad_rows) < NAMED:
                self.stats.bad_rows.append(str(error.problem(row.path, row.number)))

    def _check_usable(self, name: str) -> None:
        """Raise everything that makes the source unusable."""
        bad, rows, limit = self.stats.bad, self.stats.rows, self.settings.max_bad_share
        problems = self.problems.report() if self.broken else []
        if rows and bad > limit * rows:
            share = f"a share of {bad / rows:.3g}: above data.max_bad_share = {limit:g}"
            what = f"{bad:,} of {rows:,} rows are bad, {share}"
            problems = [*self.problems.report(), Problem(name, what, "fix the rows above, or raise data.max_bad_share")]
        if not rows:
            problems = [_no_row(name)]
        elif not problems and not self.lengths:
            what = f"every row is longer than data.max_length = {self.settings.max_length} tokens and was dropped"
            do = f"raise data.max_length: the longest row has {self.stats.longest} tokens"
            problems = [Problem(name, what, do)]
        if problems:
            raise DataError(problems)


def _same_id(row: Row, ids: Seen) -> RowError | None:
    """The error of a row whose `id` came before."""
    assert isinstance(row.value, dict)
    key = row.value.get("id")
    if not isinstance(key, str | int) or (first := ids.first(repr(key), place_of(row))) is None:
        return None
    return RowError("id", f"the same id as in {first}", "remove one of the two, or give it an id of its own", repr(key))


def _first(rows: Iterator[Row]) -> list[Row]:
    """The rows by which the format is recognised: fewer where they are very large."""
    first: list[Row] = []
    held = 0
    while len(first) < SAMPLE_ROWS and held <= _HELD and (row := next(rows, None)) is not None:
        first.append(row)
        held += weight(row.value)
    return first


def _no_row(name: str) -> Problem:
    return Problem(name, "it has no rows", "write one JSON object a line, or name another file")


def _with_progress(source: Source) -> Iterator[Row]:
    with tqdm(
        total=source.total, desc=f"Tokenising {printable(source.name)}", unit=source.unit, unit_scale=True
    ) as bar:
        for row in source:
            yield row
            bar.update(row.progress)
        if source.total:
            bar.update(source.total - bar.n)  # blank lines
