"""Rows and columns of an adapter's factors, by expert, read from disk as they are needed.

E experts, r LoRA rank, n a block of rows. PEFT keeps one pair of factors for all experts of a stack: `lora_A [E*r, in]`
is expert-major, `lora_B [out, E*r]` is rank-major (`peft.tuners.lora.layer.ParamWrapper.get_delta_weight`), with
another tool expert-major as well.
"""

from collections import OrderedDict
from threading import Lock

import torch

from finetune.adapters.contents import FactorPair
from finetune.checkpoint.reader import read_tensor

# One expert's part of `lora_B` is every E-th column: taken from disk each time, all experts' would be read for each
# expert. So those of the last stacks are at hand in order; gate and down projections take turns on disk, of two layers
# where threads work at the border of one and the next.
STACKS_AT_HAND = 4
ROWS_AT_A_TIME = 1024


class FactorReader:
    """The factors of one expert of a pair, in fp32; may be asked by several threads."""

    def __init__(self) -> None:
        self._at_hand: OrderedDict[FactorPair, torch.Tensor] = OrderedDict()
        self._lock = Lock()

    def a(self, pair: FactorPair, experts: int, expert: int) -> torch.Tensor:
        """`A_e [r, in]`."""
        r = pair.a.shape[0] // experts
        return read_tensor(pair.a, expert * r, (expert + 1) * r).float()

    def b(self, pair: FactorPair, experts: int, expert: int, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` of `B_e [out, r]`."""
        if experts == 1:
            return read_tensor(pair.b, start, stop).float()
        return self._stack(pair, experts)[expert, start:stop].float()

    def _stack(self, pair: FactorPair, experts: int) -> torch.Tensor:
        with self._lock:
            if pair not in self._at_hand:
                while len(self._at_hand) >= STACKS_AT_HAND:
                    self._at_hand.popitem(last=False)
                self._at_hand[pair] = _in_order(pair, experts)
            self._at_hand.move_to_end(pair)
            return self._at_hand[pair]


def _in_order(pair: FactorPair, experts: int) -> torch.Tensor:
    """`lora_B` as [E, out, r], a few rows at a time."""
    out, columns = pair.b.shape
    B_EOr: torch.Tensor | None = None
    for start in range(0, out, ROWS_AT_A_TIME):
        B_nR = read_tensor(pair.b, start, start + ROWS_AT_A_TIME)
        B_Enr = contiguous_ranks(B_nR, experts) if pair.expert_major else by_expert(B_nR, experts)
        if B_EOr is None:
            B_EOr = B_Enr.new_empty(experts, out, columns // experts)
        B_EOr[:, start : start + ROWS_AT_A_TIME] = B_Enr
    assert B_EOr is not None
    return B_EOr


def by_expert(B_nR: torch.Tensor, experts: int) -> torch.Tensor:
    """Rank-major rows of `lora_B` [n, r*E] as [E, n, r]."""
    return B_nR.reshape(B_nR.shape[0], -1, experts).permute(2, 0, 1)


def contiguous_ranks(B_nR: torch.Tensor, experts: int) -> torch.Tensor:
    """Expert-major rows of `lora_B` [n, E*r] as [E, n, r]."""
    return B_nR.reshape(B_nR.shape[0], experts, -1).transpose(0, 1)
