"""Check a recipe and its rows, with or without a tokenizer, and collect the results in a `Report`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from tqdm import tqdm

from finetune.adapters.initial import check_same_setup, read_initial_adapter
from finetune.adapters.record import BaseRecord
from finetune.base import Base, checkpoint_family, config_family, recipe_tokenizer
from finetune.check.check_report import Batches, Report, batches_of, pair_batches_of, split_of
from finetune.check.duplicates import find_duplicates, words_of
from finetune.check.samples import draw
from finetune.check.template_summary import Fields, summarise, visible
from finetune.checkpoint import fingerprint, forward_settings, resolve_checkpoint, verify_sums
from finetune.data.formats import FORMATS, reader, recognise
from finetune.data.render import Renderer
from finetune.data.row_errors import Problems, Row, RowError
from finetune.data.sources import open_source
from finetune.data.tokens import Mixture, PairMixture, prepare_mixture, prepare_pair_mixture
from finetune.data.tokens.examples import PAIRED_ROWS, SINGLE_ROWS, Example, ExampleType
from finetune.data.tokens.packing import count_sequences
from finetune.data.tokens.reasoning_remarks import reasoning_remarks
from finetune.errors import DataError, FinetuneError, Problem, printable
from finetune.methods.pairs import pair_layout
from finetune.methods.trainer_checks import check_schedule, check_trainer
from finetune.model_files import load_config
from finetune.recipe import DataSource, Recipe


def texts(source: DataSource, row_format: str) -> Iterator[tuple[str, str]]:
    """What each sound row says, with its `file:line`."""
    read = reader(row_format, source.columns, source.ignore_columns, source.roles)
    for row in _rows(source):
        if not isinstance(row.value, RowError):
            try:
                yield f"{row.path}:{row.number}", words_of(read(row.value))
            except RowError:
                continue  # one of the bad rows that the recipe says to drop; it is named among them


def read_without_tokenizer(sources: Sequence[DataSource], example_type: ExampleType, max_problems: int) -> None:
    """Read every row; `DataError` with all of those that the format refuses, or that are no example of this type."""
    problems: list[Problem] = []
    for source in sources:
        try:
            problems += _refused(source, example_type, max_problems)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)


def _refused(source: DataSource, example_type: ExampleType, max_problems: int) -> list[Problem]:
    refused = Problems(max_problems)
    try:
        read = reader(_format(source), source.columns, source.ignore_columns, source.roles)
    except RowError as error:
        # Where no format is known, what is no row at all is still found.
        for row in _rows(source):
            if isinstance(row.value, RowError):
                refused.add(row.path, row.number, row.value)
        return [*refused.report(), error.problem(str(source.path or source.id), 0)]
    for example in example_type.examples(_rows(source), read):
        _check_content(example, example_type)
        if (problem := example.problem) is not None:
            refused.add(problem.row.path, problem.row.number, problem.error)
    return refused.report()


def _check_content(example: Example, example_type: ExampleType) -> None:
    if example.content is not None:
        try:
            example_type.conversations(example.content)
        except RowError as error:
            example.fail(error)


def _format(source: DataSource) -> str:
    if source.format != "auto":
        return source.format
    return recognise((row.value for row in _rows(source)), source.columns, source.roles).format


def _rows(source: DataSource) -> Iterator[Row]:
    return islice(iter(open_source(source)), source.max_rows)


MAX_PROBLEMS = 1000
"""At most this many bad rows of a data set are listed; the rest is counted."""

Name = Literal["train", "eval"]
SPLITS: tuple[Name, Name] = ("train", "eval")

T = TypeVar("T")


def gather(recipe: Recipe, title: str, samples: int) -> Report:
    """Check the recipe against the model's config, and every row; `samples` rows of each data set are drawn.

    Tokenised rows are cached for the run. Problems are collected in `Report.problems`; a check runs unless it depends
    on one that failed: without a tokenizer the rows are still read.
    """
    report = Report(title, _settings(recipe), recipe.data.max_length)
    _attempt(report, lambda: check_trainer(recipe))
    base, tokenizer = _base(recipe, report)
    if recipe.model.adapter is not None:
        _attempt(report, lambda: _check_adapter(Path(str(recipe.model.adapter)), recipe, base))
    mixtures = {name: found for name in SPLITS if (found := _mixture(name, recipe, tokenizer, report))}
    share_prompts = _shares_prompts(mixtures.get("train"), recipe, base, report)
    for name, mixture in mixtures.items():
        batches = _batches(mixture, recipe, share_prompts)
        report.splits.append(split_of(name, mixture.stats(batches.sequences), batches, recipe))
        for rows, chosen in zip(mixture.sets, mixture.chosen, strict=True):
            drawn = draw(rows, chosen, samples, recipe.seed, tokenizer)
            report.samples += [(name, sample) for sample in drawn]
    if tokenizer is not None:
        report.settings += _answer_fields(mixtures.values(), recipe, tokenizer)
        stats = {split.name: split.stats for split in report.splits}
        report.reasoning_remarks = reasoning_remarks(tokenizer, recipe.data, stats)
    if (schedule := report.schedule) is not None and not report.problems:
        report.schedule_remarks = _attempt(report, lambda: check_schedule(recipe, schedule.steps)) or []
    if mixtures.keys() == {"train", "eval"}:
        report.duplicates = find_duplicates(_texts(mixtures["train"]), _texts(mixtures["eval"]))
    return report


def _attempt(report: Report, work: Callable[[], T]) -> T | None:
    """The result of `work`, or None if it raised a `FinetuneError`, whose problems are added to the report."""
    try:
        return work()
    except FinetuneError as error:
        report.problems += error.problems
        report.exit_code = max(report.exit_code, error.exit_code)
        return None


def _base(recipe: Recipe, report: Report) -> tuple[Base | None, Any]:
    """The base without its weights, None where something is wrong with it, and the tokenizer if that can be had."""
    model = recipe.model
    folder = _attempt(report, lambda: resolve_checkpoint(model.name_or_path, model.revision, weights=False))
    if folder is None:
        return None, None
    local = Path(model.name_or_path).is_dir()
    if local:
        _attempt(report, lambda: verify_sums(folder))
    # The headers of a checkpoint on the hub cannot be read before its weights are fetched.
    family = _attempt(report, lambda: (checkpoint_family if local else config_family)(folder, recipe))
    found = _attempt(report, lambda: recipe_tokenizer(folder, recipe))
    tokenizer, new_tokens = found or (None, [])
    if family is None or tokenizer is None:
        return None, tokenizer
    digest = fingerprint(folder) if local and model.adapter else None
    provenance = BaseRecord(name_or_path=model.name_or_path, fingerprint=digest, config=forward_settings(folder))
    return Base(folder, family, load_config(folder), tokenizer, tuple(new_tokens), provenance), tokenizer


def _check_adapter(folder: Path, recipe: Recipe, base: Base | None) -> None:
    """What the run would refuse in the adapter that it starts from, as far as the checkpoint is on this machine."""
    initial_adapter = read_initial_adapter(folder)
    if base is not None:
        check_same_setup(initial_adapter, recipe, base.provenance, base.tokenizer.chat_template)


def _mixture(name: Name, recipe: Recipe, tokenizer: Any, report: Report) -> Mixture | None:
    sources = recipe.data.sources(name)
    if not sources:
        return None
    of_pairs = recipe.method.kind == "dpo"
    if tokenizer is None:
        example_type = PAIRED_ROWS if of_pairs else SINGLE_ROWS
        _attempt(report, lambda: read_without_tokenizer(sources, example_type, MAX_PROBLEMS))
        return None
    prepare = prepare_pair_mixture if of_pairs else prepare_mixture
    return _attempt(report, lambda: prepare(sources, tokenizer, recipe.data, recipe.seed, MAX_PROBLEMS))


def _shares_prompts(train: Mixture | None, recipe: Recipe, base: Base | None, report: Report) -> bool:
    """Whether the run will compute a pair's prompt once for both answers; the report says why or why not."""
    if not isinstance(train, PairMixture) or base is None:
        return False
    layout, why = pair_layout(recipe, base.family, base.config, train)
    report.settings.append(("prompts", why))
    return layout == "shared"


def _answer_fields(mixtures: Iterable[Mixture], recipe: Recipe, tokenizer: Any) -> Fields:
    """What opens and ends an answer: in the chat template, where a set is rendered with it, and in rendered sets."""
    if recipe.data.loss_on == "all" and recipe.method.kind == "sft":
        return []
    used = [pair for mixture in mixtures for pair in zip(mixture.sources, mixture.sets, strict=True)]
    fields: Fields = []
    if any(FORMATS[rows.stats.format].gives != "document" for _, rows in used):
        renderer = Renderer(tokenizer, "the chat template", system=recipe.data.system)
        fields += summarise(renderer, tokenizer).fields()
    for source, rows in used:
        if source.response_template is not None:
            end = source.response_end or str(tokenizer.eos_token)
            fields.append(("opens", f"{visible(source.response_template)} (not supervised) in {rows.name}"))
            fields.append(("ends", f"{visible(end)} (supervised) in {rows.name}"))
    return fields


def _batches(mixture: Mixture, recipe: Recipe, share_prompts: bool) -> Batches:
    if isinstance(mixture, PairMixture):
        return pair_batches_of(mixture, recipe, share_prompts)
    lengths = mixture.lengths
    sequences = count_sequences(lengths, recipe.data.max_length) if recipe.data.packing else len(lengths)
    return batches_of(lengths, sequences, recipe)


def _texts(mixture: Mixture) -> Iterator[tuple[str, str]]:
    for source, rows in zip(mixture.sources, mixture.sets, strict=True):
        yield from tqdm(
            texts(source, rows.stats.format),
            desc=f"Comparing {printable(rows.name)}",
            unit=" rows",
            total=rows.stats.rows,
        )


def _settings(recipe: Recipe) -> list[tuple[str, str]]:
    data = recipe.data
    of_pairs = recipe.method.kind == "dpo"
    loss, what = ("both answers of a pair", "pairs") if of_pairs else (data.loss_on, "rows")
    limit = f"{data.max_length:,} tokens" + (" for a prompt with one answer" if of_pairs else "")
    return [
        ("model", recipe.model.name_or_path),
        ("template", data.chat_template or "the tokenizer's own"),
        ("loss on", loss),
        ("max_length", f"{limit}; longer {what}: {data.overlong}"),
        ("bad rows", data.on_bad_row),
    ]
