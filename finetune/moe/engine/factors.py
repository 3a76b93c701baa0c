"""The LoRA factors of one expert stack, in the engine's layout.

E experts, S experts with factors, r rank, I input features, O output features.
"""

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class ExpertFactors:
    """`A [S, r, I]`, `B^T` as `B [S, r, O]`, and the scale of `B A`; `experts`: the expert of each row, None: all.

    Both have r rows: products with a short inner or outer side are up to eight times faster that way on a CPU.
    `dropout`: probability that an input element of `A` is dropped.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    dropout: float = 0.0
    experts: tuple[int, ...] | None = None

    @cached_property
    def row(self) -> dict[int, int]:
        """The row of each expert that has factors."""
        return {expert: row for row, expert in enumerate(self.experts or range(self.A.shape[0]))}

    def spread(self, num_experts: int) -> "ExpertFactors":
        """The same factors with one row per expert, zeros for experts without factors."""
        if self.experts is None:
            return self
        index = torch.tensor(self.experts, device=self.A.device)
        A = self.A.new_zeros(num_experts, *self.A.shape[1:]).index_copy(0, index, self.A)
        B = self.B.new_zeros(num_experts, *self.B.shape[1:]).index_copy(0, index, self.B)
        return ExpertFactors(A, B, self.scaling, self.dropout)
