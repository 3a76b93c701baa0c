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
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from finetune.data.formats import reader, recognise
from finetune.data.render import Rendered, Renderer, Rendering
from finetune.data.row_errors import FileError, Problems, Row, RowError
from finetune.data.sources import Source, open_source
from finetune.data.tokens.cache import Seen, TokenTable, Writer, digest, entry, rows_fingerprint
from finetune.data.tokens.examples import Item, Kept, Kind, Side, Wrong, place_of
from finetune.data.tokens.stats import NAMED, RowStats
from finetune.data.tokens.truncation import TooLongError
from finetune.data.types import Ints
from finetune.errors import DataError, Problem
from finetune.recipe import DataSettings, DataSource

CHUNK_ROWS = 512
CHUNK_CHARACTERS = 1 << 19
_TOKENISERS = 2
_AHEAD = 3  # chunks that wait for the tokenizer; more would only hold memory


@dataclass(frozen=True)
class Tokenised:
    """An item with its text and the tokens of its sides, or with what is wrong with it."""

    item: Item
    text: str
    result: tuple[Rendered, ...] | Wrong


@dataclass(frozen=True)
class _Job:
    """An item with its sides and their texts, or with what is wrong with it."""

    item: Item
    sides: tuple[Side, ...] = ()
    texts: tuple[Rendering, ...] = ()
    wrong: Wrong | None = None


Chunk = list[_Job]


def tokenised(items: Iterable[Item], kind: Kind, renderer: Renderer) -> Iterator[Tokenised]:
    """Every item, in order."""
    waiting: deque[tuple[Chunk, Future[list[Rendered | RowError]]]] = deque()
    with ThreadPoolExecutor(_TOKENISERS, thread_name_prefix="tokeniser") as pool:
        for chunk in _chunks(items, kind, renderer):
            texts = [text for job in chunk for text in job.texts]
            waiting.append((chunk, pool.submit(renderer.tokenise, texts)))
            if len(waiting) > _AHEAD:
                yield from _finished(*waiting.popleft())
        while waiting:
            yield from _finished(*waiting.popleft())


def _chunks(items: Iterable[Item], kind: Kind, renderer: Renderer) -> Iterator[Chunk]:
    chunk: Chunk = []
    characters = 0
    for item in items:
        job = _job(item, kind, renderer)
        chunk.append(job)
        characters += sum(len(text.text) for text in job.texts)
        if len(chunk) == CHUNK_ROWS or characters > CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _job(item: Item, kind: Kind, renderer: Renderer) -> _Job:
    if isinstance(item.example, Wrong):
        return _Job(item, wrong=item.example)
    try:
        sides = kind.sides(item.example)
        return _Job(item, sides, tuple(_render(side, renderer) for side in sides))
    except RowError as error:
        return _Job(item, wrong=item.wrong(error))


def _render(side: Side, renderer: Renderer) -> Rendering:
    try:
        return renderer.render(side.example)
    except RowError as error:
        error.field = side.place(error.field)
        raise


def _finished(chunk: Chunk, future: Future[list[Rendered | RowError]]) -> Iterator[Tokenised]:
    results = iter(future.result())
    for job in chunk:
        if job.wrong is not None:
            yield Tokenised(job.item, "", job.wrong)
            continue
        text = "\0".join(text.text for text in job.texts)
        yield Tokenised(job.item, text, _result(job, list(islice(results, len(job.sides)))))


def _result(job: _Job, results: Sequence[Rendered | RowError]) -> tuple[Rendered, ...] | Wrong:
    """The tokens of all sides, or what is wrong with the first that has none."""
    rows = []
    for side, result in zip(job.sides, results, strict=True):
        if isinstance(result, RowError):
            result.field = side.place(result.field)
            return job.item.wrong(result)
        rows.append(result)
    return tuple(rows)


RECOGNISED_ROWS = 100
"""`format: auto` looks at so many rows."""


@dataclass(frozen=True)
class RowSet:
    """Prepared rows (or pairs) of one source: `lengths` and `supervised` are tokens of each that is kept, int32."""

    name: str
    folder: Path
    stats: RowStats
    lengths: Ints
    supervised: Ints
    content: str  # fingerprint of the source's rows, whatever is made of them

    def dataset(self) -> Dataset:
        """The columns of the kind's schema, memory-mapped."""
        return Dataset.from_file(str(self.folder / "rows.arrow"))

    def table(self) -> TokenTable:
        """The same rows for reading one by one."""
        return TokenTable(self.folder / "rows.arrow")


def prepare_rows(
    source: DataSource, tokenizer: Any, settings: DataSettings, renderer: Renderer, max_problems: int, kind: Kind
) -> RowSet:
    """What `kind` makes of the rows of one source, from the cache if nothing that they depend on has changed.

    Raises `DataError` with the bad rows, the first `max_problems` of them named, where the settings do not drop them.
    """
    opened = open_source(source)
    content = opened.fingerprint()
    parts = rows_fingerprint(opened.paths, content, source, settings, tokenizer, kind.name)

    def write(folder: Path) -> None:
        _Pass(source, settings, renderer, kind, Problems(max_problems)).write(opened, folder)
        if opened.fingerprint() != content:
            do = "start again when nothing writes to it any more"
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
    renderer: Renderer
    kind: Kind
    problems: Problems
    stats: RowStats = field(default_factory=RowStats)
    lengths: "array[int]" = field(default_factory=lambda: array("i"))
    supervised: "array[int]" = field(default_factory=lambda: array("i"))
    kept: Any = field(default_factory=hashlib.sha256)  # of the tokens and labels that are written
    broken: bool = False  # something that no setting drops

    def write(self, source: Source, folder: Path) -> None:
        """Read all of it; write `rows.arrow`, lengths and stats into the folder."""
        rows = self._recognised(islice(_with_progress(source), self.source.max_rows), source.name)
        items = self.kind.items(rows, reader(self.stats.format, self.source.columns))
        with Writer(folder / "rows.arrow", self.kind.schema) as writer, Seen() as texts, Seen() as ids:
            for each in tokenised(items, self.kind, self.renderer):
                self._take(each, writer, texts, ids)
        self._refuse(source.name)
        for name, values in (("lengths", self.lengths), ("supervised", self.supervised)):
            np.save(folder / f"{name}.npy", np.asarray(values))
        self.stats.digest = self.kept.hexdigest()
        stats = json.dumps(self.stats.as_json(), ensure_ascii=False)
        (folder / "stats.json").write_text(stats, encoding="utf-8")

    def _recognised(self, rows: Iterator[Row], name: str) -> Iterator[Row]:
        """The rows again, after `stats.format` is known."""
        self.stats.format = self.source.format
        if self.source.format != "auto":
            return rows
        first = list(islice(rows, RECOGNISED_ROWS))
        try:
            recognition = recognise((row.value for row in first), self.source.columns)
        except RowError as error:
            for row in first:
                if isinstance(row.value, RowError):
                    self.problems.add(row.path, row.number, row.value)
            problem = error.problem(name, 0) if first else _no_row(name)
            raise DataError([*self.problems.report(), problem]) from error
        self.stats.format, self.stats.why = recognition.format, recognition.why
        return chain(first, rows)

    def _take(self, each: Tokenised, writer: Writer, texts: Seen, ids: Seen) -> None:
        where, rows = each.item.where, len(each.item.rows)
        self.stats.rows += rows
        kept = self._kept(each, ids)
        if isinstance(kept, Wrong):
            self._refuse_item(each.item, kept)
            return
        for piece in kept:
            writer.append(*piece.columns, where)
            for column in piece.columns:
                self.kept.update(column.tobytes())
            self.lengths.append(piece.tokens)
            self.supervised.append(piece.supervised)
            self.stats.pieces += 1
            self.stats.tokens += piece.tokens
            self.stats.supervised_tokens += piece.supervised
        if kept and (first := texts.first(each.text, where)):
            self.stats.saw_duplicate(where, first, rows)

    def _kept(self, each: Tokenised, ids: Seen) -> Sequence[Kept] | Wrong:
        """What is kept of an item, counted, or what is wrong with it."""
        if isinstance(each.result, Wrong):
            return each.result
        for row in each.item.rows:
            if twice := _same_id(row, ids):
                return Wrong(row, twice)
        try:
            pieces = self.kind.fit(each.result, self.settings)
        except RowError as error:
            return each.item.wrong(error)
        length = max(len(side.input_ids) for side in each.result)
        self.stats.saw_length(length, each.item.where)
        too_long, rows = length > self.settings.max_length, len(each.item.rows)
        self.stats.dropped += 0 if pieces else rows
        self.stats.truncated += rows if too_long and self.settings.overlong == "truncate" else 0
        if too_long and self.settings.overlong == "split":
            self.stats.split += 1
            self.stats.pieces_left_out += -(-length // self.settings.max_length) - len(pieces)
        return pieces

    def _refuse_item(self, item: Item, wrong: Wrong) -> None:
        self.problems.add(wrong.row.path, wrong.row.number, wrong.error)
        if self.settings.on_bad_row == "error" or isinstance(wrong.error, FileError | TooLongError):
            self.broken = True
            return
        for row, error in item.left_out(wrong):
            self.stats.bad += 1
            if len(self.stats.bad_rows) < NAMED:
                self.stats.bad_rows.append(str(error.problem(row.path, row.number)))

    def _refuse(self, name: str) -> None:
        """Raise everything that makes the source unusable."""
        bad, rows, ceiling = self.stats.bad, self.stats.rows, self.settings.max_bad_share
        problems = self.problems.report() if self.broken else []
        if rows and bad > ceiling * rows:
            share = f"a share of {bad / rows:.3g}: above data.max_bad_share = {ceiling:g}"
            what = f"{bad:,} of {rows:,} rows are bad, {share}"
            problems = [*self.problems.report(), Problem(name, what, "mend the rows above, or raise the ceiling")]
        if not rows:
            problems = [_no_row(name)]
        elif not problems and not self.lengths:
            what = f"every row is longer than data.max_length = {self.settings.max_length} tokens and was dropped"
            do = f"raise data.max_length: the longest row has {self.stats.longest} tokens"
            problems = [Problem(name, what, do)]
        if problems:
            raise DataError(problems)


def _same_id(row: Row, ids: Seen) -> RowError | None:
    """What is wrong with a row whose `id` came before."""
    assert isinstance(row.value, dict)
    key = row.value.get("id")
    if not isinstance(key, str | int) or (first := ids.first(repr(key), place_of(row))) is None:
        return None
    return RowError("id", f"the same id as in {first}", "remove one of the two, or give it an id of its own", repr(key))


def _no_row(name: str) -> Problem:
    return Problem(name, "there is no row in it", "write one JSON object a line, or name another file")


def _with_progress(source: Source) -> Iterator[Row]:
    with tqdm(total=source.total, desc=f"Tokenising {source.name}", unit=source.unit, unit_scale=True) as bar:
        for row in source:
            yield row
            bar.update(row.progress)
        if source.total:
            bar.update(source.total - bar.n)  # blank lines
