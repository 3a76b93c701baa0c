"""Expert scores on the training rows, from forward passes of the frozen base before the adapter is added.

The scores come from the arguments of the experts modules, not from the router's output: these are the final indices
and weights for every architecture, after grouping, normalisation and bias correction.

T real tokens, K experts a token, E experts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from tqdm import tqdm

from finetune.errors import Problem, RunError, WeightsError
from finetune.moe.esft.choice import ExpertChoice, LayerChoice, smallest_set
from finetune.moe.families import MoeLayout
from finetune.recipe import Recipe

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
    rank_batches = batch_rows(lengths, recipe.data.max_length)[state.process_index :: state.num_processes]
    progress = tqdm(rank_batches, desc="Measuring experts", unit="batch", disable=not state.is_main_process)
    batches = (collate([dataset[row] for row in rows]) for rows in progress)
    scores = reduce(measure_experts(model, moe, batches, lora.experts_score), "sum")
    layers = tuple(_choose(layer, scores_E.tolist(), lora.experts_share) for layer, scores_E in scores.items())
    return ExpertChoice(lora.experts_score, lora.experts_share, len(lengths), sum(lengths.values()), layers)


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
            inputs = {key: value.to(model.device) for key, value in batch.items() if key not in ("labels", "rows")}
            model.base_model(**inputs, use_cache=False)  # without the head: its logits are not needed
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).reshape(-1).bool()
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
