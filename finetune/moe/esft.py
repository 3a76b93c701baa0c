"""Expert-Specialized Fine-Tuning (ESFT, arXiv 2407.01906): adapters of the most relevant experts only.

1. Scores: forward passes of the frozen base over training rows, before the adapter is added. They come from the
   arguments of the experts modules, which are the final indices and weights for every architecture, after grouping,
   normalisation and bias correction.
2. Choice: the smallest set of experts of each layer that reaches the recipe's share of the score.
3. Adapter: in memory only the factors of the chosen experts; other experts have no parameters, gradients or optimizer
   state. A state dict has PEFT's full matrices with zeros for them, so that saving, loading, resuming and merging work
   unchanged. Full: `lora_A [E*r, in]` is expert-major, `lora_B [out, r*E]` rank-major. Compact: `lora_A [S*r, in]` and
   `lora_B [out, r*S]`, in the same orders.

T real tokens, K experts a token, L layers, E experts, S chosen experts, r rank.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from tqdm import tqdm

from finetune.data.tokens.global_batches import equal_share
from finetune.errors import Problem, RunError, WeightsError
from finetune.files import write_json
from finetune.moe.families import MoeLayout
from finetune.moe.lora import FactoredStackLora
from finetune.moe.sharding import whole
from finetune.recipe import Recipe
from finetune.upstream import clean_name

SCORES = {"gate": "of the router weight", "token": "of the tokens' choices"}


@dataclass(frozen=True)
class LayerChoice:
    """One decoder layer, by its path in the model. `scores`: each expert's share, together 1; `experts`: ascending."""

    layer: str
    scores: tuple[float, ...]
    experts: tuple[int, ...]

    @property
    def share(self) -> float:
        """The adapted experts' share of the layer's score."""
        return sum(self.scores[expert] for expert in self.experts)


@dataclass(frozen=True)
class ExpertChoice:
    """The choice of a run. `share` as requested; `rows` and `tokens` as measured; layers in the model's order."""

    score: str
    share: float
    rows: int
    tokens: int
    layers: tuple[LayerChoice, ...]

    @property
    def experts(self) -> dict[str, tuple[int, ...]]:
        """Adapted experts by layer path."""
        return {layer.layer: layer.experts for layer in self.layers}

    @property
    def adapted(self) -> float:
        """Share of all expert parameters that are adapted; experts of one model are of one size."""
        return sum(len(layer.experts) for layer in self.layers) / sum(len(layer.scores) for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `reached` and `adapted` are informative and not read back."""
        layers = [{**asdict(layer), "reached": layer.share} for layer in self.layers]
        return {**asdict(self), "adapted": self.adapted, "layers": layers}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ExpertChoice":
        """The inverse of `as_dict`; raises ValueError, TypeError or KeyError for anything else."""
        layers = tuple(
            LayerChoice(str(layer["layer"]), tuple(map(float, layer["scores"])), tuple(map(int, layer["experts"])))
            for layer in values["layers"]
        )
        choice = cls(str(values["score"]), float(values["share"]), int(values["rows"]), int(values["tokens"]), layers)
        if choice.score not in SCORES or not layers or not all(_is_sound(layer) for layer in layers):
            raise ValueError("an unknown score, layer or expert")
        return choice

    def lines(self) -> list[str]:
        """The printed summary: one line per layer, and a total."""
        chosen = sum(len(layer.experts) for layer in self.layers)
        total = sum(len(layer.scores) for layer in self.layers)
        return [
            *(
                f"layer {layer.layer.rpartition('.')[2]}: {len(layer.experts)} of {len(layer.scores)} experts, "
                f"{100 * layer.share:.1f} % {SCORES[self.score]}"
                for layer in self.layers
            ),
            f"adapted: {chosen} of {total} experts, {100 * self.adapted:.1f} % of the experts' parameters "
            f"(measured on {self.tokens:,} tokens of {self.rows:,} rows)",
        ]

    def write(self, path: Path) -> None:
        """Write as JSON, in one step."""
        write_json(path, self.as_dict())


def read_choice(path: Path) -> ExpertChoice:
    """Read the choice written by a run; RunError if it is missing or invalid."""
    do = "start anew in another output_dir: experts that are measured again may be others"
    if not path.is_file():
        raise RunError(Problem(str(path), "the run that is to be continued has no choice of experts", do))
    try:
        return ExpertChoice.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        got = str(error) if type(error) is ValueError else repr(error)
        raise RunError(Problem(str(path), "not a choice of experts", do, got=got)) from error


def _is_sound(layer: LayerChoice) -> bool:
    """At least one expert, ascending, each with a score."""
    return list(layer.experts) == sorted(set(layer.experts) & set(range(len(layer.scores)))) != []


def smallest_set(scores_E: Sequence[int], share: float) -> tuple[int, ...]:
    """The fewest experts, by descending score, whose scores add up to at least `share` of the total; ascending.

    Exact: the scores are integers and the share is the decimal number in the recipe. Of equal scores the lower expert
    comes first.
    """
    wanted = Fraction(repr(share)) * sum(scores_E)
    reached, chosen = 0, []
    for expert in sorted(range(len(scores_E)), key=lambda expert: -scores_E[expert]):
        chosen.append(expert)
        reached += scores_E[expert]
        if reached >= wanted:
            break
    return tuple(sorted(chosen))


_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
# Weights are summed as integers of this unit, so the sum does not depend on the order or the number of processes.
_UNIT = 2.0**-32

Batch = Mapping[str, Any]
Collate = Callable[[list[dict[str, Any]]], Batch]


def choose_experts(model: Any, moe: MoeLayout, dataset: Any, collate: Collate, recipe: Recipe) -> ExpertChoice:
    """Draw rows of `dataset`, measure them on all processes, and choose experts as the recipe says.

    All processes choose from the same integers, so their choices are equal.
    """
    lora, state = recipe.lora, PartialState()
    assert lora.experts_share is not None  # the recipe was checked
    lengths = draw_rows(dataset, lora.experts_tokens, recipe.seed)
    mine = equal_share(batch_rows(lengths, recipe.data.max_length), state.process_index, state.num_processes)
    progress = tqdm(mine, desc="Measuring experts", unit="batch", disable=not state.is_main_process)
    batches = (_batch([dataset[row] for row in rows], collate, counts) for rows, counts in progress)
    scores = reduce(measure_experts(model, moe, batches, lora.experts_score), "sum")
    layers = tuple(_choose(layer, scores_E.tolist(), lora.experts_share) for layer, scores_E in scores.items())
    return ExpertChoice(lora.experts_score, lora.experts_share, len(lengths), sum(lengths.values()), layers)


def _batch(rows: list[dict[str, Any]], collate: Collate, counts: bool) -> Batch:
    batch = collate(rows)
    return batch if counts else {**batch, "weight": torch.zeros_like(batch["weight"])}


def _choose(layer: str, scores_E: list[int], share: float) -> LayerChoice:
    total = sum(scores_E)
    if not total:
        what = "no expert of this layer was given weight by any measured token"
        raise RunError(Problem(layer, what, "measure more rows (lora.experts_tokens), or write lora.experts: all"))
    return LayerChoice(layer, tuple(score / total for score in scores_E), smallest_set(scores_E, share))


def draw_rows(dataset: Any, tokens: int, seed: int) -> dict[int, int]:
    """Draw rows with `seed` until they have `tokens` tokens or all are drawn; returns each row's length."""
    lengths: dict[int, int] = {}
    for row in torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist():
        if tokens <= 0:
            break
        lengths[row] = len(dataset[row]["input_ids"])
        tokens -= lengths[row]
    return lengths


def batch_rows(lengths: Mapping[int, int], limit: int) -> list[list[int]]:
    """Group rows, longest first, into batches of at most `limit` tokens including padding.

    No row is longer than `limit`. The batches do not depend on the machine.
    """
    batches: list[list[int]] = []
    for row in sorted(lengths, key=lambda row: (-lengths[row], row)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= limit:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def measure_experts(model: Any, moe: MoeLayout, batches: Iterable[Batch], score: str) -> dict[str, torch.Tensor]:
    """Each expert's score over the real tokens of `batches`, by path of the decoder layer; int64 `[E]`, in any unit.

    `score`: gate (sum of the router's weights, ESFT-Gate) or token (number of choices, ESFT-Token). Raises RunError at
    a weight that is not finite.
    """
    suffix = f".{moe.experts_module}"
    experts = {name.removesuffix(suffix): module for name, module in model.named_modules() if name.endswith(suffix)}
    if not experts:
        what = "the loaded model has no experts of this name"
        raise WeightsError(Problem(moe.experts_module, what, "report this architecture"))
    # One more element than there are experts: index E means "no expert".
    totals = [
        torch.zeros(module.num_experts + 1, dtype=torch.int64, device=model.device) for module in experts.values()
    ]
    was_training = model.training
    model.eval()
    for batch in batches:
        with _calls(list(experts.values())) as calls, torch.no_grad():
            inputs = {key: value.to(model.device) for key, value in batch.items() if key in _MODEL_INPUTS}
            model.base_model(**inputs, use_cache=False)  # without the head: its logits are not needed
        real = batch["weight"].reshape(-1).bool().to(model.device)
        for layer, index_TK, weight_TK in calls:
            if not weight_TK[real].isfinite().all():
                raise _not_finite(list(experts)[layer], batch)
            _tally(totals[layer], index_TK[real], weight_TK[real], score)
    model.train(was_training)
    return {layer: total[:-1] for layer, total in zip(experts, totals, strict=True)}


@contextmanager
def _calls(experts: list[torch.nn.Module]) -> Iterator[list[tuple[int, torch.Tensor, torch.Tensor]]]:
    """Number of the module, indices and weights of every call of `experts` in the block."""
    calls: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def keep(number: int) -> Callable[..., None]:
        return lambda _module, args: calls.append((number, args[1], args[2]))

    handles = [module.register_forward_pre_hook(keep(number)) for number, module in enumerate(experts)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _tally(total_E: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor, score: str) -> None:
    """Add the score of these tokens to `total_E`, in place."""
    value_TK = torch.ones_like(index_TK) if score == "token" else (weight_TK.double() / _UNIT).round().long()
    total_E.index_add_(0, index_TK.reshape(-1), value_TK.reshape(-1))


def _not_finite(layer: str, batch: Batch) -> RunError:
    rows = ", ".join(map(str, batch["rows"][:32]))
    what = f"a router weight is not finite while experts are measured; rows: {rows}"
    return RunError(Problem(layer, what, "look at these rows, or use model.dtype bfloat16 instead of float16"))


def keep_chosen(model: torch.nn.Module, chosen: Mapping[str, tuple[int, ...]]) -> None:
    """Drop the factors of all experts but the chosen ones; `chosen`: decoder layer's path -> ascending experts.

    Called on a fresh adapter, before an optimizer exists. Raises WeightsError if model and choice differ in
    their layers, or an expert does not exist.
    """
    adapted_layers: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, FactoredStackLora):
            continue
        layer = next((layer for layer in chosen if clean_name(name).startswith(f"{layer}.")), None)
        if layer is None or max(chosen[layer]) >= module.num_experts:
            raise _other_model(clean_name(name), f"experts of {', '.join(chosen)}")
        adapted_layers.add(layer)
        for adapter in module.lora_A:
            _compact(module, adapter, chosen[layer])
    if missing := sorted(set(chosen) - adapted_layers):
        raise _other_model(missing[0], "no adapted experts there")


def _other_model(where: str, got: str) -> WeightsError:
    do = "start anew in another output_dir, so that the experts are measured on this model"
    return WeightsError(Problem(where, "the choice of experts was made for another model", do, got=got))


def _compact(wrapper: Any, adapter: str, experts: tuple[int, ...]) -> None:
    full, rank = wrapper.num_experts, wrapper.r[adapter]
    if len(experts) == full:
        return
    grid_Er = torch.arange(full * rank).reshape(full, rank)
    grid_rE = torch.arange(full * rank).reshape(rank, full)
    chosen = torch.tensor(experts)
    for linear, dim, index in (
        (wrapper.lora_A[adapter], 0, grid_Er[chosen].reshape(-1)),
        (wrapper.lora_B[adapter], 1, grid_rE[:, chosen].reshape(-1)),
    ):
        layout = _Layout(dim, index, full * rank)
        linear.weight = torch.nn.Parameter(layout.compact(linear.weight.detach()).clone(), linear.weight.requires_grad)
        linear.out_features, linear.in_features = linear.weight.shape
        # torch sets an attribute on the hook, which bound methods do not allow.
        linear.register_state_dict_post_hook(partial(layout.save))
        linear.register_load_state_dict_pre_hook(partial(layout.load))
    wrapper.chosen = {**wrapper.chosen, adapter: experts}


@dataclass(frozen=True)
class _Layout:
    """Positions of one factor's compact slices in the full matrix: along `dim`, at `index`, of `size` in total."""

    dim: int
    index: torch.Tensor
    size: int

    def compact(self, full: torch.Tensor) -> torch.Tensor:
        return full.index_select(self.dim, self.index.to(full.device))

    def expand(self, compact: torch.Tensor) -> torch.Tensor:
        shape = list(compact.shape)
        shape[self.dim] = self.size
        return compact.new_zeros(shape).index_copy_(self.dim, self.index.to(compact.device), compact)

    def save(self, _module: Any, state_dict: dict[str, torch.Tensor], prefix: str, _metadata: Any) -> None:
        """State dict hook: expand the weight in `state_dict`."""
        state_dict[f"{prefix}weight"] = self.expand(whole(state_dict[f"{prefix}weight"].detach()))

    def load(self, _module: Any, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
        """Load hook: compact the weight in `state_dict`; torch reports a weight of another shape."""
        full = state_dict.get(f"{prefix}weight")
        if full is None or full.shape[self.dim] != self.size:
            return
        compact = self.compact(full)
        if full.count_nonzero() != compact.count_nonzero():
            raise WeightsError(
                Problem(
                    f"{prefix}weight",
                    "the adapter changes experts that this run does not adapt",
                    "continue the run with the experts.json that it was made with, or start anew in another output_dir",
                )
            )
        state_dict[f"{prefix}weight"] = compact
