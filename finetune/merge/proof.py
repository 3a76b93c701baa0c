"""Proofs that a merged checkpoint is base + adapter. Each of them can fail.

The log of the merge is checked against the contents of adapter and base; then the written files are loaded again, and
their logits are compared with those of base + adapter in stock transformers and PEFT.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetune.adapters.adapter import Adapter
from finetune.adapters.deltas import Change
from finetune.adapters.whole_tensors import TokenRows
from finetune.checkpoint import CheckpointReader, TensorInfo, TensorSpec
from finetune.checkpoint.reader import TORCH_DTYPES, read_tensor
from finetune.errors import Problem, WeightsError
from finetune.merge.stream import TensorLog, TensorResult, blocks

if TYPE_CHECKING:
    from finetune.merge.layerwise import LayerwiseModel

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "Turn on the light in the kitchen and set the alarm for half past six.",
    "def add(a, b):\n    return a + b\n",
    "List three things that float on water: 1.",
)
MAX_PROMPT_TOKENS = 48
# Share of the adapter's own effect on the logits that the merged model may be off by, in the mean. Rounding to 16 bits
# costs some per cent; in float32 only the order of sums differs, and an expert left out must show.
MAX_RELATIVE_DISTANCE = 0.1
MAX_RELATIVE_DISTANCE_FLOAT32 = 0.01
MAX_FLOAT32_DIFFERENCE = 1e-4
# Share of the choices of experts that may fall otherwise, with equal choices before; rounding to bf16 cost 0.2 % when
# measured on a 30-layer model.
MAX_OTHER_EXPERTS = 0.05
# Share of the delta's norm lost in rounding from which the output's number format is named as the cause of a failure.
COARSE_ROUNDING = 0.1


@dataclass(frozen=True)
class LogitFigures:
    """Distances between logits over all prompts; means and maxima of absolute differences."""

    tokens: int
    adapter_effect_mean: float  # base against base + adapter
    merged_change_mean: float  # base against merged
    merged_error_mean: float  # merged against base + adapter
    merged_error_max: float
    rerouted_error_mean: float | None  # the same with the adapter's choice of experts; None for a dense model
    other_experts: float | None  # share of the choices that merged alone would make otherwise
    # Logits of the added tokens alone, of which few stand among many: how large, and how far off; None without any.
    added_mean: float | None = None
    added_error_mean: float | None = None


def prove_usage(log: TensorLog, adapters: Sequence[Adapter], changes: Mapping[str, Change]) -> int:
    """Every row of every expert of every factor pair went into one row on disk; returns the adapters' tensors."""
    by_path = {(delta.owner, delta.path): delta for change in changes.values() for delta in change.deltas}
    used, problems = log.used(), []
    for owner, adapter in enumerate(adapters):
        for path, pair in adapter.pairs.items():
            delta = by_path.get((owner, path))
            count, extent = (1, pair.b.shape[0]) if delta is None else (delta.experts, delta.extent)
            for expert in range(count):
                if not _tiles(used.get((owner, path, expert), []), extent):
                    got = f"expert {expert} of {count}"
                    problems.append(Problem(path, "adapter tensor was not used exactly once", "report this bug", got))
    if problems:
        raise WeightsError(problems)
    return sum(
        2 * len(adapter.pairs) + len(adapter.rows) + len(adapter.whole) + len(adapter.spare) for adapter in adapters
    )


def rounding(results: Iterable[TensorResult]) -> float | None:
    """Norm of what rounding lost over the norm of the delta; None without any delta."""
    sums = [(result.rounding, result.rounded_delta) for result in results]
    delta = sum(part for _, part in sums)
    return math.sqrt(sum(lost for lost, _ in sums) / delta) if delta else None


def _tiles(blocks: list[tuple[int, int]], rows: int) -> bool:
    """Whether the blocks (first row, past it) cover rows 0 to `rows` without gap or overlap."""
    position = 0
    for first, past in sorted(blocks):
        if first != position:
            return False
        position = past
    return position == rows


def prove_keys(merged: CheckpointReader, specs: list[TensorSpec]) -> int:
    """The written checkpoint holds the base's keys with the announced shapes; returns their number."""
    expected = {spec.key: (spec.dtype, spec.shape) for spec in specs}
    actual = {key: (merged.info(key).dtype, merged.info(key).shape) for key in merged.keys}
    wrong = sorted(key for key in expected | actual if expected.get(key) != actual.get(key))
    if wrong:
        got = f"{len(wrong)} differ, first {wrong[0]}: {actual.get(wrong[0])} for {expected.get(wrong[0])}"
        raise WeightsError(Problem(str(merged.folder), "keys or shapes differ from the base's", "report this bug", got))
    return len(actual)


def prove_copies(base: CheckpointReader, merged: CheckpointReader, fixed: Mapping[str, TensorInfo]) -> set[str]:
    """What was to be copied is in the merged checkpoint bit for bit; returns what the base has otherwise."""
    for key, info in fixed.items():
        if not torch.equal(merged.read(key), read_tensor(info)):
            raise WeightsError(Problem(key, "tensor was not copied as it is", "report this bug"))
    return {key for key in fixed if not torch.equal(merged.read(key), base.read(key).to(merged.read(key).dtype))}


def prove_rows(base: CheckpointReader, merged: CheckpointReader, token_rows: Mapping[str, TokenRows]) -> None:
    """Of matrices that take rows of added tokens, these are the adapter's and all others the base's, bit for bit."""
    for key, rows in token_rows.items():
        written, wanted = merged.read(key), read_tensor(rows.info)
        tokens, others = list(rows.tokens), torch.ones(len(written), dtype=torch.bool)
        others[tokens] = False
        kept = base.read(key).to(written.dtype)[others[: rows.base_rows]]
        if not torch.equal(written[tokens], wanted.to(written.dtype)) or not torch.equal(written[others], kept):
            raise WeightsError(Problem(key, "rows of added tokens are in the wrong place", "report this bug"))


def prove_changes(
    base: CheckpointReader,
    merged: CheckpointReader,
    targeted: set[str],
    proven: Collection[str] = (),
    advance: Callable[[int], object] = lambda _: None,
) -> int:
    """The tensors on disk that differ from the base's are those with a non-zero delta, no others; returns their number.

    Both checkpoints are read again; where the output has another dtype the base is rounded to it first. `proven` keys
    are left out: `prove_rows` has looked at them.
    """
    changed = set()
    for key in base.keys:
        if key in proven:
            continue
        dtype = TORCH_DTYPES[merged.info(key).dtype]
        for start, stop in blocks(base.info(key)):
            rows = base.read_rows(key, start, stop)
            if not torch.equal(rows.to(dtype), merged.read_rows(key, start, stop)):
                changed.add(key)
            advance(rows.numel() * rows.itemsize)
    extra, lost = sorted(changed - targeted), sorted(targeted - changed)
    if extra:
        raise WeightsError(Problem(extra[0], "tensor changed without a delta", "report this bug", f"{len(extra)} such"))
    if lost:
        what = f"{len(lost)} of {len(targeted)} changes vanished in rounding"
        raise WeightsError(Problem(lost[0], what, "merge with --dtype float32: the delta is below the number format"))
    return len(changed)


def prompt_ids(tokenizer: Any, tokens: Sequence[int], texts: Sequence[str] | None = None) -> list[torch.Tensor]:
    """The prompts (the fixed ones where `texts` is None) as token ids [T], cut to MAX_PROMPT_TOKENS.

    With added `tokens` also one in which they stand between words.
    """
    encoded = (tokenizer(text)["input_ids"][:MAX_PROMPT_TOKENS] for text in texts or PROMPTS)
    prompts = [torch.tensor(ids) for ids in encoded if ids]
    if tokens:
        words = prompts[0][: MAX_PROMPT_TOKENS // 2]
        added = torch.tensor([tokens[place % len(tokens)] for place in range(len(words))])
        prompts.append(torch.stack([added, words], dim=1).reshape(-1))
    return prompts


def measure_logits(
    reference: Mapping[str, torch.Tensor],
    merged: "LayerwiseModel",
    prompts: list[torch.Tensor],
    tokens: Sequence[int] = (),
    advance: Callable[[int], object] = lambda _: None,
) -> LogitFigures:
    """Logits of base and base + adapter (the `reference`) and those of the merged model in fp32, compared.

    `tokens`: the added ones.
    """
    plain, adapted = reference["plain"].double(), reference["adapted"].double()
    merged_logits = {name: logits.double() for name, logits in merged.logits(prompts, advance).items()}
    error, routing = (merged_logits["plain"] - adapted).abs(), merged.routing
    added = list(tokens)
    return LogitFigures(
        tokens=len(adapted),
        adapter_effect_mean=float((plain - adapted).abs().mean()),
        merged_change_mean=float((merged_logits["plain"] - plain).abs().mean()),
        merged_error_mean=float(error.mean()),
        merged_error_max=float(error.max()),
        rerouted_error_mean=None if routing is None else float((merged_logits["rerouted"] - adapted).abs().mean()),
        other_experts=None if routing is None else routing.differing / routing.decisions,
        added_mean=float(adapted[:, added].abs().mean()) if added else None,
        added_error_mean=float(error[:, added].mean()) if added else None,
    )


def judge_logits(figures: LogitFigures, float32: bool, rounding: float | None) -> None:
    """Raise WeightsError unless the merged model computes what base + adapter computes.

    `float32`: the output is float32 throughout; `rounding`: norm of what rounding took, over the norm of the delta
    (None without a delta).
    """
    if not all(math.isfinite(value) for value in asdict(figures).values() if value is not None):
        raise WeightsError(Problem("proof: logits", "not finite", "check the base and the adapter", str(figures)))
    share = MAX_RELATIVE_DISTANCE_FLOAT32 if float32 else MAX_RELATIVE_DISTANCE
    _judge_added(figures, share)
    allowed = share * figures.adapter_effect_mean
    if figures.merged_error_mean <= allowed or (float32 and figures.merged_error_max <= MAX_FLOAT32_DIFFERENCE):
        return
    rerouted, others = figures.rerouted_error_mean, figures.other_experts
    if rerouted is not None and others is not None and rerouted <= allowed and others <= MAX_OTHER_EXPERTS:
        return
    what = "merged model differs from base + adapter"
    got = (
        f"mean difference {figures.merged_error_mean:.3g} where the adapter's whole effect is "
        f"{figures.adapter_effect_mean:.3g}"
    )
    if rerouted is not None and others is not None:
        got += f" ({rerouted:.3g} under the adapter's routing, {others:.2%} of the choices of experts differ)"
    do = "report this bug"
    if not float32 and rounding is not None and rounding > COARSE_ROUNDING:
        do = (
            "the adapter's change is below the resolution of the number format (rounding error is "
            f"{rounding:.0%} of the change): merge with --dtype float32"
        )
    raise WeightsError(Problem("proof: logits", what, do, got))


def _judge_added(figures: LogitFigures, share: float) -> None:
    """Raise WeightsError where the logits of added tokens are off: among all others they would not be seen."""
    size, error = figures.added_mean, figures.added_error_mean
    if size is not None and error is not None and error > share * size:
        got = f"mean difference {error:.3g} where they are {size:.3g}"
        what = "logits of the added tokens differ from base + adapter"
        raise WeightsError(Problem("proof: logits", what, "report this bug", got))
