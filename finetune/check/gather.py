"""A recipe -> what there is to say about it and its rows."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from tqdm import tqdm

from finetune.check.report import Batches, Report, batches_of, pair_batches_of, split_of
from finetune.check.samples import draw
from finetune.check.texts import read_without_tokenizer, texts
from finetune.check.twins import find_twins
from finetune.checkpoint import fingerprint
from finetune.data.tokens import Mixture, PairMixture, prepare_mixture, prepare_pair_mixture
from finetune.data.tokens.examples import PAIRED_ROWS, SINGLE_ROWS
from finetune.data.tokens.packing import count_sequences
from finetune.errors import FinetuneError
from finetune.methods.pair_layout import pair_layout
from finetune.model import (
    architecture_config,
    checkpoint_family,
    config_family,
    recipe_tokenizer,
    resolve_checkpoint,
)
from finetune.moe.earlier import read_earlier, refuse_unfit
from finetune.moe.layout import Family
from finetune.recipe import Recipe

MAX_PROBLEMS = 1000
"""So many bad rows of a set are named; the rest is counted."""

Name = Literal["train", "eval"]
SPLITS: tuple[Name, Name] = ("train", "eval")

T = TypeVar("T")


def gather(recipe: Recipe, title: str, samples: int) -> Report:
    """Check the recipe against the model's config, and every row; `samples` rows of each set are drawn.

    Prepared rows go to the cache, where the run finds them. What is wrong ends in `Report.problems`, from everything
    that does not depend on what is wrong elsewhere: without a tokenizer the rows are still read.
    """
    report = Report(title, _settings(recipe), recipe.data.max_length)
    base = _base(recipe, report)
    if recipe.model.adapter is not None:
        _attempt(report, lambda: _refuse_adapter(Path(str(recipe.model.adapter)), recipe, base))
    mixtures = {name: found for name in SPLITS if (found := _mixture(name, recipe, base.tokenizer, report))}
    share_prompts = _shares_prompts(mixtures.get("train"), recipe, base, report)
    for name, mixture in mixtures.items():
        batches = _batches(mixture, recipe, share_prompts)
        report.splits.append(split_of(name, mixture.stats(batches.sequences), batches, recipe))
        for rows, chosen in zip(mixture.sets, mixture.chosen, strict=True):
            drawn = draw(rows, chosen, samples, recipe.seed, base.tokenizer)
            report.samples += [(name, sample) for sample in drawn]
    if mixtures.keys() == {"train", "eval"}:
        report.twins = find_twins(_texts(mixtures["train"]), _texts(mixtures["eval"]))
    return report


def _attempt(report: Report, work: Callable[[], T]) -> T | None:
    """The result, or None where what is expected to go wrong did, and stands in the report."""
    try:
        return work()
    except FinetuneError as error:
        report.problems += error.problems
        report.exit_code = max(report.exit_code, error.exit_code)
        return None


class _Base(NamedTuple):
    """Of the checkpoint what could be had: its folder, its architecture and the run's tokenizer."""

    folder: Path | None = None
    family: Family | None = None
    tokenizer: Any = None


def _base(recipe: Recipe, report: Report) -> _Base:
    """All that the checkpoint tells without its weights."""
    folder = _attempt(report, lambda: resolve_checkpoint(recipe.model, weights=False))
    if folder is None:
        return _Base()
    local = Path(recipe.model.name_or_path).is_dir()
    # Of a checkpoint on the hub there are no headers to read before its weights are there.
    family = _attempt(report, lambda: (checkpoint_family if local else config_family)(folder, recipe))
    found = _attempt(report, lambda: recipe_tokenizer(folder, recipe))
    return _Base(folder, family, None if found is None else found[0])


def _refuse_adapter(folder: Path, recipe: Recipe, base: _Base) -> None:
    """What the run would refuse in the adapter that it goes on from, as far as the checkpoint lies here."""
    earlier = read_earlier(folder)
    if base.folder is None or base.family is None or base.tokenizer is None:
        return
    weights = fingerprint(base.folder) if Path(recipe.model.name_or_path).is_dir() else None
    refuse_unfit(earlier, recipe, weights, base.tokenizer.chat_template)


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


def _shares_prompts(train: Mixture | None, recipe: Recipe, base: _Base, report: Report) -> bool:
    """Whether the run will compute a pair's prompt once for both answers; the report says why or why not."""
    if not isinstance(train, PairMixture) or base.folder is None or base.family is None:
        return False
    layout, why = pair_layout(recipe, base.family, architecture_config(base.folder), train)
    report.settings.append(("prompts", why))
    return layout == "shared"


def _batches(mixture: Mixture, recipe: Recipe, share_prompts: bool) -> Batches:
    if isinstance(mixture, PairMixture):
        return pair_batches_of(mixture, recipe, share_prompts)
    lengths = mixture.lengths
    sequences = count_sequences(lengths, recipe.data.max_length) if recipe.data.packing else len(lengths)
    return batches_of(lengths, sequences, recipe)


def _texts(mixture: Mixture) -> Iterator[tuple[str, str]]:
    for source, rows in zip(mixture.sources, mixture.sets, strict=True):
        yield from tqdm(
            texts(source, rows.stats.format), desc=f"Comparing {rows.name}", unit=" rows", total=rows.stats.rows
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
