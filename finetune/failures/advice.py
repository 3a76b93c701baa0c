"""Settings of a recipe that would need less memory, the largest saving first.

The savings are estimates: of weights by the audit's counts, of the adapter's gradients and optimizer states, and of the
activations that a backward pass keeps, by the sizes in the base's configuration. They are good to some ten per cent of
what they count, which is enough for their order; what they do not count (the allocator's gaps, the loss head) does not
depend on these settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.progress import Progress
from finetune.recipe import DpoSettings, Recipe

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_NF4_BYTES = 0.52  # a weight with its share of the block's constants
_NOT_QUANTIZED = ("router", "embeddings", "norms", "head", "other")
_SHORTEST = 256  # tokens; shorter rows are rarely what is wanted
_SHARED_PROMPTS = 0.75  # of the tokens of pairs whose prompts are as long as their answers
_WITHOUT_ROWS = ("starting", "reading the base", "preparing rows", "loading the base")
_WITHOUT_BACKWARD = ("measuring experts", "computing the reference", "evaluating")

Change = Mapping[str, Any]


@dataclass(frozen=True)
class Saving:
    """`settings` as they are written on the command line; `saved`: estimated bytes."""

    settings: str
    saved: float
    note: str

    def __str__(self) -> str:
        return f"{self.settings}  (about {size(self.saved)} less; {self.note})"


def size(number: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:,.1f} TiB"


def savings(run: Progress, on_gpu: bool) -> list[Saving]:
    """What would help in this phase and is not done already."""
    recipe: Recipe = run.recipe
    now = _estimate(recipe, run)
    found = []
    for settings, changed, note in _candidates(recipe, on_gpu):
        saved = now - _estimate(changed, run)
        if saved > 0.01 * now:
            found.append(Saving(settings, saved, note))
    return sorted(found, key=lambda saving: -saving.saved)


def _candidates(recipe: Recipe, on_gpu: bool) -> list[tuple[str, Recipe, str]]:
    same, other = "the same result", "another result"
    model, training, method = recipe.model, recipe.training, recipe.method
    changes: list[tuple[bool, str, Change, str]] = [
        (training.per_device_train_batch_size > 1, "training", {"per_device_train_batch_size": 1}, same),
        (training.gradient_checkpointing != "full", "training", {"gradient_checkpointing": "full"}, same),
        (model.attn_implementation == "eager", "model", {"attn_implementation": "sdpa"}, same),
        (not model.load_in_4bit and model.adapter is None, "model", {"load_in_4bit": True}, other),
        (model.dtype == "float32" and model.adapter is None, "model", {"dtype": "bfloat16"}, other),
        (on_gpu and training.optim in ("adamw_torch", "adamw_torch_fused"), "training", {"optim": "adamw_8bit"}, other),
        (recipe.lora.r > 1 and model.adapter is None, "lora", _smaller_rank(recipe), other),
        (recipe.data.max_length >= 2 * _SHORTEST, "data", _shorter_rows(recipe), "another result for longer rows"),
    ]
    if isinstance(method, DpoSettings):
        changes.append((method.prompt_sharing == "off", "method", {"prompt_sharing": "auto"}, same))
    return [
        (_written(section, change), _changed(recipe, section, change), note)
        for go, section, change, note in changes
        if go
    ]


def _smaller_rank(recipe: Recipe) -> Change:
    lora = recipe.lora
    smaller = {"r": max(lora.r // 2, 1)}
    return smaller if lora.expert_r is None else {**smaller, "expert_r": max(lora.expert_r // 2, 1)}


def _shorter_rows(recipe: Recipe) -> Change:
    shorter: dict[str, Any] = {"max_length": recipe.data.max_length // 2}
    return {**shorter, "overlong": "truncate"} if recipe.data.overlong == "error" else shorter


def _changed(recipe: Recipe, section: str, change: Change) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=dict(change))})


def _written(section: str, change: Change) -> str:
    return " ".join(f"{section}.{key}={str(value).lower()}" for key, value in change.items())


def _estimate(recipe: Recipe, run: Progress) -> float:
    """Bytes that a process needs, without what no setting changes."""
    needed = _weights(recipe, run)
    if run.doing not in _WITHOUT_ROWS:
        needed += _activations(recipe, run, backward=run.doing not in _WITHOUT_BACKWARD)
        needed += _adapter(recipe, run)
    return needed


def _weights(recipe: Recipe, run: Progress) -> float:
    dense = _BYTES[recipe.model.dtype]
    quantized = _NF4_BYTES if recipe.model.load_in_4bit else dense
    if not run.parts:
        return run.base_bytes / 2 * quantized  # its files have 16 bits a weight
    of_part = (part["parameters"] * (dense if part["part"] in _NOT_QUANTIZED else quantized) for part in run.parts)
    return float(sum(of_part))


def _adapter(recipe: Recipe, run: Progress) -> float:
    """The adapter in float32, its gradient, and the optimizer's two states."""
    states = 2 if "8bit" in recipe.training.optim else 8
    lora, trained = recipe.lora, 0.0
    for part in run.parts:
        rank = (lora.expert_r or lora.r) if part["part"] == "experts" else lora.r
        trained += part["trained"] * rank / max(part["ranks"] or [rank])
    return trained * (4 + 4 + states)


def _activations(recipe: Recipe, run: Progress, backward: bool) -> float:
    """What a backward pass keeps of each layer, and a whole layer, which is always there once."""
    data, training, dense = recipe.data, recipe.training, _BYTES[recipe.model.dtype]
    rows = training.per_device_train_batch_size
    tokens = float(rows * data.max_length)
    if isinstance(recipe.method, DpoSettings):
        tokens *= 2 * (_SHARED_PROMPTS if recipe.method.prompt_sharing == "auto" else 1)
    hidden, layers = _dimension(run, "hidden_size"), _dimension(run, "num_hidden_layers")
    inner = _dimension(run, "moe_intermediate_size") or _dimension(run, "intermediate_size")
    experts = _dimension(run, "num_experts_per_tok") or 1
    whole = tokens * dense * (12 * hidden + experts * (4 * inner + hidden))
    if recipe.model.attn_implementation == "eager":
        whole += tokens * data.max_length * _dimension(run, "num_attention_heads") * (4 + 2 * dense)
    kept = {
        "none": whole,
        "selective": tokens * dense * (7 * hidden + experts * (3 * inner + hidden)),
        "full": tokens * dense * hidden,
    }[training.gradient_checkpointing]
    return whole + (kept * max(layers - 1, 0) if backward else 0.0)


def _dimension(run: Progress, name: str) -> int:
    """Of the base's configuration; 0 where it has another name, or was not read yet."""
    value = run.config.get(name)
    return value if isinstance(value, int) else 0
