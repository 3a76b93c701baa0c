"""One source -> its token rows in the cache, with everything that was counted on the way."""

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from finetune.data.formats import reader, recognise
from finetune.data.render import Renderer
from finetune.data.rows import FileError, Problems, Row, RowError
from finetune.data.sources import Source, open_source
from finetune.data.tokens.cache import digest, entry, rows_fingerprint
from finetune.data.tokens.examples import Item, Wrong, place_of
from finetune.data.tokens.kinds import Kept, Kind
from finetune.data.tokens.lengths import TooLongError
from finetune.data.tokens.seen import Seen
from finetune.data.tokens.stats import NAMED, RowStats
from finetune.data.tokens.stream import Tokenised, tokenised
from finetune.data.tokens.table import TokenTable, Writer
from finetune.data.types import Ints
from finetune.errors import DataError, Problem
from finetune.recipe import DataSettings, DataSource

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
