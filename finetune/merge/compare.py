"""`--compare`: measure on rows which base to merge into.

An adapter trained on a 4-bit base has seen other weights than the 16-bit ones. Adding it to the 16-bit weights
(`original`) restores what rounding removed, which is usually better but is not the trained model; adding it to the
dequantised weights (`dequantized`) gives the trained model. Both merges are run on the same rows in the memory of one
layer, without writing either. The rows are read and rendered with the settings of the adapter's training.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax, nll_loss
from torch.nn.utils.rnn import pad_sequence

from finetune.adapters.deltas import Change, FactorReader
from finetune.adapters.record import read_record
from finetune.checkpoint import CheckpointReader, TensorInfo, TensorSpec
from finetune.checkpoint.reader import TORCH_DTYPES, read_tensor
from finetune.data import load_tokenizer, prepare, prepare_pair_mixture, set_template_args, set_template_day
from finetune.errors import DataError, WeightsError
from finetune.merge.base_weights import reference_model, trained_dtype
from finetune.merge.dequantized_base import DequantizedReader
from finetune.merge.job import Job
from finetune.merge.layerwise import LayerwiseModel
from finetune.merge.report import Candidate, Comparison
from finetune.merge.stream import Sources
from finetune.recipe import DataSettings, DataSource

IGNORED = -100  # label of a token without a loss
Rows = Sequence[tuple[torch.Tensor, torch.Tensor]]
_KEPT = ("loss_on", "system", "max_length", "overlong", "train_on_reasoning")
# Of an adapter that does not say how long its rows were: longer ones are cut.
MAX_LENGTH = 2048


def compare_rows(data: Path, count: int, adapter: Path, tokenizer: Path) -> Rows:
    """Ids and labels [T] of the first `count` rows of a data file, by the settings that the adapter records.

    Of pairs of answers the chosen ones are taken.

    `tokenizer`: the folder with the merged model's. Raises DataError for a file that cannot be read, and for rows
    with nothing to learn in them.
    """
    recorded = _recorded(adapter)
    own = tokenizer == adapter  # then it carries the template that was trained with
    loaded = load_tokenizer(str(tokenizer), None, None if own else recorded.get("chat_template"))
    record = read_record(adapter)
    set_template_day(loaded, record.template_day)
    set_template_args(loaded, record.template_args or {})
    source = _source(data, count, recorded)
    settings = DataSettings.model_validate(
        {
            "max_length": MAX_LENGTH,
            "overlong": "truncate",
            **{name: recorded[name] for name in _KEPT if name in recorded},
            "train": source,
            "chat_template": None if own else recorded.get("chat_template"),
        }
    )
    try:
        rows = prepare([source], loaded, settings, seed=0).dataset
    except DataError as error:
        return _chosen(source, loaded, settings, error)
    return [(torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in rows]


def _chosen(source: DataSource, tokenizer: Any, settings: DataSettings, error: DataError) -> Rows:
    """Of a file of pairs the answers that were chosen; `error` of any other."""
    of_pairs = settings.model_copy(update={"loss_on": "assistant", "overlong": "truncate"})
    try:
        [pairs] = prepare_pair_mixture([source], tokenizer, of_pairs, seed=0).sets
    except DataError:
        raise error from None
    return [
        (
            torch.tensor(row["prompt_ids"] + row["chosen_ids"]),
            torch.tensor([IGNORED] * len(row["prompt_ids"]) + row["chosen_labels"]),
        )
        for row in pairs.dataset()
    ]


def _recorded(adapter: Path) -> dict[str, Any]:
    """The data section of the recipe that the adapter was trained with; empty where there is no record of it."""
    data: dict[str, Any] = (read_record(adapter).recipe or {}).get("data") or {}
    return data


def _source(data: Path, count: int, recorded: dict[str, Any]) -> DataSource:
    """The file as the recipe describes it if it names it, else as its columns tell."""
    given = [recorded.get("eval"), recorded.get("train")]
    known = [source for section in given for source in (section if isinstance(section, list) else [section]) if source]
    same: dict[str, Any] = next(
        (source for source in known if source.get("path") and Path(source["path"]).resolve() == data.resolve()), {}
    )
    kept = ("columns", "ignore_columns", "roles", "response_template", "response_end")
    how = {key: same[key] for key in kept if same.get(key)}
    how["format"] = same.get("format", "auto")
    return DataSource(path=str(data), max_rows=count, **how)


class MergedReader(CheckpointReader):
    """What a merge of `sources` as `specs` would write.

    `shift` and `delta` hold, for tensors with a change that were read, the squares of two norms: of what the base
    differs by from the one `beside` it, and of the change.
    """

    def __init__(self, sources: Sources, specs: list[TensorSpec], beside: CheckpointReader) -> None:
        self.folder, self.sources = sources.base.folder, sources
        self._specs = {spec.key: spec for spec in specs}
        self._beside = beside
        self._factors = FactorReader()
        self.keys = list(self._specs)
        self.shift: dict[str, float] = {}
        self.delta: dict[str, float] = {}

    def holds(self, key: str) -> bool:
        """Whether it has a tensor of this name."""
        return key in self._specs

    def info(self, key: str) -> TensorInfo:
        """As the tensor would be written; it lies nowhere."""
        spec = self._specs[key]
        return replace(self.sources.base.info(key), dtype=spec.dtype, shape=spec.shape, nbytes=spec.nbytes)

    def read(self, key: str) -> torch.Tensor:
        """The whole tensor, added in fp32 and rounded once."""
        spec, sources = self._specs[key], self.sources
        dtype = TORCH_DTYPES[spec.dtype]
        if key in sources.fixed:
            return read_tensor(sources.fixed[key]).to(dtype)
        change = sources.changes.get(key)
        merged = sources.base.read(key) if change is None else self._changed(key)
        merged = merged.to(dtype)
        return sources.token_rows[key].onto(merged) if key in sources.token_rows else merged

    def read_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` (of all axes but the last, as one)."""
        whole = self.read(key)
        return whole.reshape(-1, whole.shape[-1])[start:stop]

    def _changed(self, key: str) -> torch.Tensor:
        base, change = self.sources.base, self.sources.changes[key]
        info = base.info(key).as_rows()
        merged = torch.empty(info.shape, dtype=torch.float32)
        shift = delta = 0.0
        for first in range(0, info.shape[0], change.step):
            past = first + change.step
            left_nR, right_RI = change.factors(first, self._factors)
            rows = base.read_rows(key, first, past).float()
            shift += _square(rows - self._beside.read_rows(key, first, past))
            added = left_nR @ right_RI
            delta += _square(added)
            torch.add(rows, added, out=merged[first:past])
        self.shift[key], self.delta[key] = shift, delta
        return merged.reshape(base.info(key).shape)


def _square(values: torch.Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))


BATCH_TOKENS = 2048  # that are run through a layer together


@dataclass
class _Sums:
    """Over supervised tokens, fp64."""

    loss: float = 0.0
    kl: float = 0.0


def compare(job: Job, data: str, rows: Rows, advance: Callable[[int], object] = lambda _: None) -> Comparison:
    """Loss and KL of the merges into both bases against base + adapter as trained; `advance` is told of each layer."""
    bases, why = _bases(job)
    merges = {name: _merge_into(job, base) for name, base in bases.items()}
    opened = bases.get("dequantized", job.opened)
    trained = reference_model(opened, job.before, job.base_config, job.adapters, None, job.sources.token_rows)
    models = {name: LayerwiseModel(merged, job.config) for name, merged in merges.items()}
    batches = list(_batches(rows))
    ids = [pad_sequence([ids_T for ids_T, _ in batch], batch_first=True) for batch in batches]
    reference = trained.hidden(ids, advance)
    states = {name: model.hidden(ids, advance) for name, model in models.items()}
    head, heads = trained.head(), {name: model.head() for name, model in models.items()}
    base, figures, tokens = _Sums(), {name: _Sums() for name in models}, 0
    for number, batch in enumerate(batches):
        for row, (_, labels) in enumerate(batch):
            places = (labels[1:] != IGNORED).nonzero()[:, 0]
            wanted = labels[places + 1]
            expected = _log_probabilities(head, reference[number][row], places)
            base.loss += float(nll_loss(expected, wanted, reduction="sum"))
            tokens += len(places)
            for name, sums in figures.items():
                merged = _log_probabilities(heads[name], states[name][number][row], places)
                sums.loss += float(nll_loss(merged, wanted, reduction="sum"))
                sums.kl += divergence(expected, merged)
    into = {name: Candidate(sums.loss / tokens, sums.kl / tokens) for name, sums in figures.items()}
    shift = _shift(opened, merges, job.sources.changes)
    return Comparison(data, len(rows), tokens, base.loss / tokens, into, shift, advice(into, why))


def _batches(rows: Rows) -> Iterator[Rows]:
    """Rows of like length together. What fills up the shorter ones stands behind them, where nothing looks at it."""
    batch: list[tuple[torch.Tensor, torch.Tensor]] = []
    for row in sorted(rows, key=lambda row: len(row[0])):
        if batch and (len(batch) + 1) * len(row[0]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _log_probabilities(
    head: Callable[[torch.Tensor], torch.Tensor], state_TH: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """Of the tokens that follow `places`, fp64 [n, V]."""
    return log_softmax(head(state_TH[None, places]).double(), dim=-1)


def divergence(trained: torch.Tensor, merged: torch.Tensor) -> float:
    """Sum over tokens of KL(trained || merged), from log-probabilities [n, V]."""
    return float(kl_div(merged, trained, reduction="sum", log_target=True))


def layers_to_run(job: Job) -> int:
    """How often `compare` advances."""
    return (1 + len(_bases(job)[0])) * int(LayerwiseModel(job.base, job.base_config).num_layers)


def _bases(job: Job) -> tuple[dict[str, CheckpointReader], str | None]:
    """The bases that can be merged into, by name, and why there is but one."""
    plain = CheckpointReader(job.base.folder)
    try:
        dtype = trained_dtype(job.adapters, job.fingerprint)
    except WeightsError as error:
        return {"original": job.opened}, error.problems[0].what
    return {"original": plain, "dequantized": DequantizedReader(plain.folder, job.family, dtype)}, None


def _merge_into(job: Job, base: CheckpointReader) -> MergedReader:
    sources, beside = job.sources, job.over(CheckpointReader(base.folder))
    return MergedReader(Sources(job.over(base), sources.changes, sources.fixed, sources.token_rows), job.specs, beside)


def _shift(
    opened: CheckpointReader, merges: Mapping[str, MergedReader], changes: Mapping[str, Change]
) -> dict[str, float]:
    """By part, how far NF4 moves the base over how far the adapter does, over all tensors that were quantised."""
    if not isinstance(opened, DequantizedReader):
        return {}
    seen = merges["dequantized"]
    shift: dict[str, float] = {}
    delta: dict[str, float] = {}
    for key in seen.shift.keys() & opened.quantized:
        part = changes[key].part
        shift[part] = shift.get(part, 0.0) + seen.shift[key]
        delta[part] = delta.get(part, 0.0) + seen.delta[key]
    return {part: math.sqrt(shift[part] / delta[part]) for part in sorted(shift) if delta[part]}


def advice(into: Mapping[str, Candidate], why: str | None) -> str:
    """One line that follows from the figures."""
    if why is not None:
        return f"only into {next(iter(into))} was measured: {why}"
    by_loss, by_kl = (min(into, key=lambda name: getattr(into[name], what)) for what in ("loss", "kl"))
    if by_loss == by_kl:
        return f"merge --into {by_loss}: lower loss on these rows, and closer to what was trained"
    return f"--into {by_loss} has the lower loss on these rows, --into {by_kl} is closer to what was trained"
