"""Pairs of answers in a micro-batch: their log-probabilities, their layout and the overlap of their routing.

`score_pairs` computes both answers of each pair in one forward. `pair_layout` chooses the layout, for a run and for
`finetune check`, and shares prompts only if the model can attend to two answers after one prompt. `RoutingOverlap`
measures how often policy and reference, and both answers to a prompt, are routed to the same experts.

B pairs, W tokens of the longest answer, T tokens of a row.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from trl.trainer.utils import FusedCausalLMOutput

from finetune.data import PairMixture
from finetune.data.tokens.collators import PROMPT, PairLayout, needs_one_row
from finetune.moe.families import Family
from finetune.moe.router import Overlap, Router, RouterRecord, answer_overlap, policy_overlap
from finetune.recipe import DpoSettings, Recipe

_PER_TOKEN = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


def score_pairs(model: Any, batch: Mapping[str, Any], attention: str) -> FusedCausalLMOutput:
    """The outputs of TRL's fused head for each token of each answer, `[2B, W]`, chosen answers first; 0 where masked.

    `model` has TRL's `add_fused_lm_head`, adapted by `fit_head`, and is called once; it may be wrapped by PEFT and
    DDP. `attention`: its attn_implementation. Fields that the head was not asked for are None.
    """
    inputs = {name: batch[name] for name in ("position_ids", "attention_mask") if name in batch}
    if "branch" in batch:
        inputs["attention_mask"] = shared_prompt_mask(batch["document"], batch["branch"], attention, _dtype(model))
    outputs = model(
        input_ids=batch["input_ids"],
        shift_labels=batch["shift_labels"],
        supervised=batch["supervised"],
        fused_lm_head=True,
        use_cache=False,
        **inputs,
    )
    masked_BW = batch["completion_mask"] == 0

    def of_answers(per_token: torch.Tensor) -> torch.Tensor:
        return per_token.reshape(-1)[batch["answer_index"]].masked_fill(masked_BW, 0)

    fields = {name: getattr(outputs, name) for name in _PER_TOKEN}
    fields = {name: None if value is None else of_answers(value) for name, value in fields.items()}
    return FusedCausalLMOutput(**fields, label_mask=~masked_BW)


def shared_prompt_mask(
    document: torch.Tensor, branch: torch.Tensor, attention: str, dtype: torch.dtype
) -> torch.Tensor:
    """The attention mask `[rows, 1, T, T]` from `document` and `branch` `[rows, T]`.

    A token sees those of its own document that are not after it and of its own branch or of the prompt. Boolean for
    sdpa; for eager, which adds it to the scores, 0 and the least number of `dtype`.
    """
    query, key = document.unsqueeze(-1), document.unsqueeze(-2)
    visible = (query == key).tril_()
    visible &= (branch.unsqueeze(-2) == PROMPT) | (branch.unsqueeze(-1) == branch.unsqueeze(-2))
    visible = visible.unsqueeze(1)
    if attention == "sdpa":
        return visible
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


def _dtype(model: Any) -> torch.dtype:
    """The dtype of the frozen weights; adapters may have another."""
    dtypes = (parameter.dtype for parameter in model.parameters() if not parameter.requires_grad)
    dtype: torch.dtype = next(dtypes, None) or next(model.parameters()).dtype
    return dtype


MASKED_ATTENTION = ("sdpa", "eager")
"""Attention implementations that accept an explicit mask."""


def prompt_sharing_refusal(family: Family, config: Any, attn_implementation: str, max_length: int) -> str | None:
    """Why sharing a prompt between two answers would change their results; None if it does not.

    `config`: transformers' own, with its defaults. `max_length`: tokens of the longest prompt with one answer.
    """
    if family.unpackable:
        return family.unpackable
    if attn_implementation not in MASKED_ATTENTION:
        return f"{attn_implementation} takes no mask of who sees whom (use {' or '.join(MASKED_ATTENTION)})"
    reach = _reach(config)
    if reach is not None and reach < max_length:
        return (
            f"some of its layers look back {reach} tokens only, which the mask of shared prompts does not say, and a "
            f"row may have {max_length}"
        )
    return None


def _reach(config: Any) -> int | None:
    """The shortest attention window of all layers in tokens; None without a window.

    Windows count positions within a document, so a longer row of several pairs changes nothing.
    """
    # transformers keeps unknown fields of a config.json without using them.
    declared = {field.name: getattr(config, field.name) for field in fields(config)}
    kinds = declared.get("layer_types")
    reaches = {
        "sliding_attention": declared.get("sliding_window"),
        "chunked_attention": declared.get("attention_chunk_size"),
    }
    # Without layer types one window applies to all layers.
    windows = [reach for kind, reach in reaches.items() if reach is not None and (kinds is None or kind in kinds)]
    return min(windows, default=None)


MIN_GAIN = 1.1
"""Prompts are shared if that reduces the tokens by at least this factor; below it the attention mask costs more."""


def pair_layout(recipe: Recipe, family: Family, config: Any, mixture: PairMixture) -> tuple[PairLayout, str]:
    """The layout for these training pairs, and a remark on how their prompts are computed and why."""
    method, data = recipe.method, recipe.data
    assert isinstance(method, DpoSettings)
    packed: PairLayout = "flat" if needs_one_row(recipe.model.attn_implementation) else "packed"
    plain = packed if data.packing else "padded"
    if method.prompt_sharing == "off":
        return plain, "computed for each answer, as method.prompt_sharing says"
    refusal = prompt_sharing_refusal(family, config, recipe.model.attn_implementation, data.max_length)
    if refusal is not None:
        return plain, f"computed for each answer; {family.model_type} cannot share them: {refusal}"
    gain = float(mixture.places(False).sum() / mixture.places(True).sum())
    saved = f"{100 * (1 - 1 / gain):.1f} % of the tokens"
    if gain < MIN_GAIN:
        return plain, f"computed for each answer; sharing them would save {saved}"
    return "shared", f"computed once for both answers, which saves {saved}"


class RoutingOverlap:
    """Shares of tokens with the same set of experts, since the last line. Only `figures` waits for the device."""

    def __init__(self, routers: list[Router]) -> None:
        self.routers = routers
        self._models = self._answers = self._zero()

    def compare_models(self, policy: RouterRecord, reference: RouterRecord, weight_T: torch.Tensor) -> None:
        """The same tokens in both."""
        self._models = self._models + policy_overlap(policy, reference, weight_T)

    def compare_answers(self, record: RouterRecord, inputs: Mapping[str, Any]) -> None:
        """The j-th token of the chosen answer with the j-th of the rejected one."""
        self._answers = self._answers + answer_overlap(record, inputs["answer_index"], inputs["answer_length"])

    def figures(self, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Means over layers; empty if nothing was compared."""
        overlaps = {"router/same_as_reference": self._models, "router/same_in_both_answers": self._answers}
        sums = torch.stack([torch.stack([overlap.same_L.mean(), overlap.tokens]) for overlap in overlaps.values()])
        self._models = self._answers = self._zero()
        rows = sum_over_ranks(sums).tolist()
        return {name: same / tokens for name, (same, tokens) in zip(overlaps, rows, strict=True) if tokens}

    def _zero(self) -> Overlap:
        zeros = torch.zeros(len(self.routers), device=self.routers[0].device)
        return Overlap(zeros, zeros.sum())
