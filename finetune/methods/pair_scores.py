"""Log-probabilities of both answers of each pair, from one forward on a batch of `finetune.data.tokens.collators`.

B pairs, W tokens of the longest answer, T tokens of a row.
"""

from collections.abc import Mapping
from typing import Any

import torch
from trl.trainer.utils import FusedCausalLMOutput

from finetune.data.tokens.collators import PROMPT

_PER_TOKEN = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


def score_pairs(model: Any, batch: Mapping[str, Any], attention: str) -> FusedCausalLMOutput:
    """The outputs of TRL's fused head for each token of each answer, `[2B, W]`, chosen answers first; 0 where masked.

    `model` has TRL's `add_fused_lm_head` and is called once; it may be wrapped by PEFT and DDP. `attention`: its
    attn_implementation. Fields that the head was not asked for are None.
    """
    inputs = {name: batch[name] for name in ("position_ids", "attention_mask") if name in batch}
    if "branch" in batch:
        inputs["attention_mask"] = shared_prompt_mask(batch["document"], batch["branch"], attention, _dtype(model))
    outputs = model(
        input_ids=batch["input_ids"],
        shift_labels=batch["shift_labels"],
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
