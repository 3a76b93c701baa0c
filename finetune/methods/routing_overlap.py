"""How often policy and reference, and the two answers to a prompt, are routed to the same experts."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from finetune.moe.overlap import Overlap, answer_overlap, policy_overlap
from finetune.moe.router import Router, RouterRecord


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
