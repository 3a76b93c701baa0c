"""A recipe -> what there is to say about it and its rows."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from tqdm import tqdm

from finetune.check.report import Report, split_of
from finetune.check.samples import draw
from finetune.check.texts import read_without_tokenizer, texts
from finetune.check.twins import find_twins
from finetune.data.tokens import Mixture, prepare_mixture
from finetune.data.tokens.packing import count_sequences
from finetune.errors import FinetuneError
from finetune.model import checkpoint_family, config_family, recipe_tokenizer, resolve_checkpoint
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
    tokenizer = _tokenizer(recipe, report)
    mixtures: dict[str, Mixture] = {}
    for name in SPLITS:
        mixture = _mixture(name, recipe, tokenizer, report)
        if mixture is not None:
            mixtures[name] = mixture
            report.splits.append(split_of(name, mixture.stats(_sequences(mixture, recipe)), mixture.lengths, recipe))
            for rows, chosen in zip(mixture.sets, mixture.chosen, strict=True):
                drawn = draw(rows, chosen, samples, recipe.seed, tokenizer)
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


def _tokenizer(recipe: Recipe, report: Report) -> Any:
    """The run's tokenizer; on the way all that the checkpoint tells without its weights."""
    folder = _attempt(report, lambda: resolve_checkpoint(recipe.model, weights=False))
    if folder is None:
        return None
    local = Path(recipe.model.name_or_path).is_dir()
    # Of a checkpoint on the hub there are no headers to read before its weights are there.
    _attempt(report, lambda: (checkpoint_family if local else config_family)(folder, recipe))
    found = _attempt(report, lambda: recipe_tokenizer(folder, recipe))
    return None if found is None else found[0]


def _mixture(name: Name, recipe: Recipe, tokenizer: Any, report: Report) -> Mixture | None:
    sources = recipe.data.sources(name)
    if not sources:
        return None
    if tokenizer is None:
        _attempt(report, lambda: read_without_tokenizer(sources, MAX_PROBLEMS))
        return None
    return _attempt(report, lambda: prepare_mixture(sources, tokenizer, recipe.data, recipe.seed, MAX_PROBLEMS))


def _sequences(mixture: Mixture, recipe: Recipe) -> int:
    lengths = mixture.lengths
    if not recipe.data.packing:
        return len(lengths)
    return count_sequences(lengths, recipe.data.max_length)


def _texts(mixture: Mixture) -> Iterator[tuple[str, str]]:
    for source, rows in zip(mixture.sources, mixture.sets, strict=True):
        yield from tqdm(
            texts(source, rows.stats.format), desc=f"Comparing {rows.name}", unit=" rows", total=rows.stats.rows
        )


def _settings(recipe: Recipe) -> list[tuple[str, str]]:
    data = recipe.data
    return [
        ("model", recipe.model.name_or_path),
        ("template", data.chat_template or "the tokenizer's own"),
        ("loss on", data.loss_on),
        ("max_length", f"{data.max_length:,} tokens; longer rows: {data.overlong}"),
        ("bad rows", data.on_bad_row),
    ]
