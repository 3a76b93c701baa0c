"""Sources -> the data set of a run: rows from the cache, mixed as the weights say, packed if asked."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from finetune.data.render import Marks, RenderedText, Renderer, read_template
from finetune.data.row_errors import MAX_PROBLEMS
from finetune.data.tokens.cache import PACKED, Writer, digest, entry
from finetune.data.tokens.examples import SINGLE_ROWS, ExampleType, TextRenderer
from finetune.data.tokens.packing import Indices, best_fit_decreasing, mix
from finetune.data.tokens.stats import DataStats, SetStats
from finetune.data.tokens.tokenize_rows import RowSet, prepare_rows
from finetune.data.types import Ints
from finetune.errors import DataError, Problem
from finetune.recipe import DataSettings, DataSource


@dataclass(frozen=True)
class Prepared:
    """`dataset` columns: `input_ids`, `labels` (-100: not supervised; NOT shifted), `row` (`file:line`).

    With packing also `position_ids`, which restart at each document, and `row` is the list of the packed rows.
    """

    dataset: Dataset
    stats: DataStats


@dataclass(frozen=True)
class Mixture:
    """Prepared sources and which of their rows make the data set."""

    sets: list[RowSet]
    sources: Sequence[DataSource]
    chosen: list[Indices]

    @property
    def lengths(self) -> Ints:
        """Tokens of each row (or pair) of the data set."""
        return np.concatenate([rows.lengths[indices] for rows, indices in zip(self.sets, self.chosen, strict=True)])

    def stats(self, sequences: int) -> DataStats:
        """The counts; `sequences` is the length of the data set that was made."""
        return DataStats(
            [
                SetStats(
                    name=rows.name,
                    weight=source.weight,
                    rows=len(indices),
                    tokens=int(rows.lengths[indices].sum()),
                    supervised_tokens=int(rows.supervised[indices].sum()),
                    source=rows.stats,
                    content=rows.content,
                )
                for rows, source, indices in zip(self.sets, self.sources, self.chosen, strict=True)
            ],
            sequences,
        )


def prepare(sources: Sequence[DataSource], tokenizer: Any, settings: DataSettings, seed: int) -> Prepared:
    """Read, render, tokenise, mark what is supervised, cut, mix and pack, as the settings say.

    `tokenizer` comes from `load_tokenizer` with `settings.chat_template`. The result is the same for the same files,
    settings and `seed`, whatever the machine. Raises `DataError` with the bad rows of all sources, each as
    `file:line: field: what; got; do`.
    """
    mixture = prepare_mixture(sources, tokenizer, settings, seed)
    dataset = _packed(mixture, settings.max_length) if settings.packing else _joined(mixture)
    return Prepared(dataset, mixture.stats(len(dataset)))


def prepare_mixture(
    sources: Sequence[DataSource],
    tokenizer: Any,
    settings: DataSettings,
    seed: int,
    max_problems: int = MAX_PROBLEMS,
    example_type: ExampleType = SINGLE_ROWS,
) -> Mixture:
    """The first part of `prepare`: every row is read and checked, and those that are used are chosen."""
    renderers = _renderers(sources, tokenizer, settings)
    sets: list[RowSet] = []
    problems: list[Problem] = []
    for source, renderer in zip(sources, renderers, strict=True):
        try:
            sets.append(prepare_rows(source, tokenizer, settings, renderer, max_problems, example_type))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    weights = [source.weight for source in sources if source.weight is not None]
    sizes = [len(rows.lengths) for rows in sets]
    chosen = mix(sizes, weights or None, settings.stopping_strategy, seed)
    _check_not_empty(sets, chosen)
    return Mixture(sets, sources, chosen)


def _renderers(sources: Sequence[DataSource], tokenizer: Any, settings: DataSettings) -> list[TextRenderer]:
    """What makes text of the rows of each source: the chat template, except where the rows are rendered already."""
    name = _template_name(tokenizer, settings.chat_template)
    renderers: list[TextRenderer] = []
    by_template = None
    for source in sources:
        if source.format == "rendered":
            marks = Marks(source.response_template, source.response_end)
            renderers.append(RenderedText(tokenizer, settings.loss_on, marks))
            continue
        if by_template is None:
            by_template = Renderer(tokenizer, name, settings.loss_on, settings.system, settings.train_on_reasoning)
        renderers.append(by_template)
    return renderers


def _template_name(tokenizer: Any, name: str | None) -> str:
    """What messages call the template; `DataError` if the tokenizer carries another one than the recipe names."""
    if name is None:
        return "the tokenizer's own chat template"
    if tokenizer.chat_template != read_template(name):
        # What is saved beside the adapter must be what was trained.
        do = "load the tokenizer with load_tokenizer(..., chat_template=data.chat_template)"
        raise DataError(Problem("data.chat_template", f"the tokenizer carries another template than {name}", do))
    return f"the chat template {name}"


def _check_not_empty(sets: Sequence[RowSet], chosen: Sequence[Indices]) -> None:
    problems = [
        Problem(
            rows.name,
            f"its weight is so small that none of its {len(rows.lengths):,} rows is used",
            "raise its weight, give the other sets more rows, or set data.stopping_strategy: all_exhausted",
        )
        for rows, indices in zip(sets, chosen, strict=True)
        if not len(indices)
    ]
    if problems:
        raise DataError(problems)


def _joined(mixture: Mixture) -> Dataset:
    parts = [
        rows.dataset() if np.array_equal(indices, np.arange(len(rows.lengths))) else rows.dataset().select(indices)
        for rows, indices in zip(mixture.sets, mixture.chosen, strict=True)
    ]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _packed(mixture: Mixture, max_length: int) -> Dataset:
    """Columns `input_ids`, `labels`, `position_ids`, `row`: written once, by bins, and memory-mapped."""
    # The names of the sets' folders tell max_length too.
    parts = {
        "sets": [rows.folder.name for rows in mixture.sets],
        "chosen": [hashlib.sha256(indices.tobytes()).hexdigest() for indices in mixture.chosen],
    }

    def write(folder: Path) -> None:
        tables = [rows.table() for rows in mixture.sets]
        table_of = np.repeat(np.arange(len(tables)), [len(indices) for indices in mixture.chosen])
        index_of = np.concatenate(mixture.chosen)
        with Writer(folder / "packed.arrow", PACKED) as writer:
            for indices in best_fit_decreasing(mixture.lengths, max_length):
                columns, where = zip(*(tables[table_of[i]].row(int(index_of[i])) for i in indices), strict=True)
                ids, labels = zip(*columns, strict=True)
                positions = np.concatenate([np.arange(len(row_ids), dtype=np.int32) for row_ids in ids])
                writer.append(np.concatenate(ids), np.concatenate(labels), positions, list(where))

    return Dataset.from_file(str(entry(f"packed-{digest(parts)}", write) / "packed.arrow"))
