"""The LoRA factors of one expert stack, as the engine takes them.

E experts, S experts with factors, r rank, I input features, O output features.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ExpertFactors:
    """`A [S, r, I]`, `B [S, O, r]` and the scale of `B A`; `experts` names the expert of each row, None: all in order.

    `dropout`: probability that an input element of `A` is dropped.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    dropout: float = 0.0
    experts: tuple[int, ...] | None = None

    def spread(self, num_experts: int) -> "ExpertFactors":
        """The same factors with one row an expert, zeros for those that have none."""
        if self.experts is None:
            return self
        index = torch.tensor(self.experts, device=self.A.device)
        A = self.A.new_zeros(num_experts, *self.A.shape[1:]).index_copy(0, index, self.A)
        B = self.B.new_zeros(num_experts, *self.B.shape[1:]).index_copy(0, index, self.B)
        return ExpertFactors(A, B, self.scaling, self.dropout)
