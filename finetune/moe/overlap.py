"""Routing overlap of two models or two answers: counts of tokens with equal sets of experts.

T tokens, K experts a token, L MoE layers, B pairs, W tokens of the longest answer. No host sync.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from finetune.moe.router import RouterRecord, changed_sets


@dataclass(frozen=True)
class Overlap:
    """Sums over tokens, additive over micro-batches, steps and ranks."""

    same_L: torch.Tensor  # compared tokens whose sets of experts are equal, by layer; float32
    tokens: torch.Tensor  # compared tokens; a float32 scalar

    def __add__(self, other: "Overlap") -> "Overlap":
        return Overlap(self.same_L + other.same_L, self.tokens + other.tokens)


def policy_overlap(policy: RouterRecord, reference: RouterRecord, weight_T: torch.Tensor) -> Overlap:
    """Policy against reference on the same batch; `weight_T`: how often each token counts, 0 for padding."""
    weight_T = weight_T.reshape(-1).to(torch.float32)
    return _overlap(policy.indices, reference.indices, weight_T)


def answer_overlap(record: RouterRecord, answer_index: torch.Tensor, answer_length: torch.Tensor) -> Overlap:
    """The j-th token of the chosen answer against the j-th of the rejected one, up to the shorter answer's length.

    `answer_index` `[2B, W]`: position that predicts the j-th token, chosen answers first; `answer_length` `[2B]`.
    """
    chosen_BW, rejected_BW = answer_index.chunk(2)
    common_B = torch.minimum(*answer_length.chunk(2))
    both_BW = torch.arange(answer_index.shape[1], device=answer_index.device) < common_B.unsqueeze(-1)
    # A token directly follows the position that predicts it.
    positions = [(position_BW + 1).reshape(-1) for position_BW in (chosen_BW, rejected_BW)]
    chosen, rejected = ([index_TK[position] for index_TK in record.indices] for position in positions)
    return _overlap(chosen, rejected, both_BW.reshape(-1).to(torch.float32))


def _overlap(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], weight_T: torch.Tensor) -> Overlap:
    changed = [changed_sets(*indices) for indices in zip(ours, theirs, strict=True)]
    total = weight_T.sum()
    return Overlap(total - torch.stack([(changed_T * weight_T).sum() for changed_T in changed]), total)
