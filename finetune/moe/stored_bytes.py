"""4-bit weights as flat bytes, expert by expert, so that a process's share of the bytes is a run of experts.

    expert 0: packed values, block maxima, their maxima, offset; expert 1: ...

Each tensor starts at a multiple of 16 bytes, so that views of any dtype exist. A linear layer is a stack of one expert.

E experts, O output features, I input features, B bytes of one expert.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from finetune.moe.nf4 import Nf4Part, Nf4Stack, quantize_matrix, stored_sizes

ALIGNMENT = 16


class _Part(NamedTuple):
    """One stored tensor within an expert: its first byte, its bytes, its dtype."""

    start: int
    size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Share:
    """Which part of flat bytes a process holds: number `index` of `count` parts, as `fully_shard` cuts them."""

    index: int
    count: int

    def of(self, total: int) -> range:
        """The bytes of this part; the last parts may be shorter, or empty."""
        size = -(-total // self.count)
        return range(min(self.index * size, total), min((self.index + 1) * size, total))


@dataclass(frozen=True)
class StackBytes:
    """The layout of a stack `[E, O, I]` that is dequantised to `dtype`."""

    shape: torch.Size
    dtype: torch.dtype

    @cached_property
    def _parts(self) -> tuple[_Part, ...]:
        parts, start = [], 0
        for count, dtype in stored_sizes(self.shape[1:].numel()):
            parts.append(_Part(start, count * dtype.itemsize, dtype))
            start += -(-parts[-1].size // ALIGNMENT) * ALIGNMENT
        return tuple(parts)

    @cached_property
    def expert_bytes(self) -> int:
        """B."""
        last = self._parts[-1]
        return last.start + -(-last.size // ALIGNMENT) * ALIGNMENT

    @property
    def total(self) -> int:
        """Bytes of all experts."""
        return self.shape[0] * self.expert_bytes

    def experts(self, share: Share) -> range:
        """The experts of which a share holds bytes; one for a share that is empty."""
        held = share.of(self.total)
        first = min(held.start // self.expert_bytes, self.shape[0] - 1)
        return range(first, max(-(-held.stop // self.expert_bytes), first + 1))

    def quantize_part(self, share: Share, experts: Iterable[torch.Tensor]) -> Nf4Part:
        """The part of a process, from the matrices `[O, I]` of `experts(share)`, which are read one by one."""
        own, held = share.of(self.total), self.experts(share)
        part: torch.Tensor | None = None
        for expert, weight_OI in zip(held, experts, strict=True):
            if part is None:
                part = torch.empty(len(own), dtype=torch.uint8, device=weight_OI.device)
            flat = self.flatten([tensor[None] for tensor in quantize_matrix(weight_OI)])
            first = expert * self.expert_bytes
            start, stop = max(own.start, first), min(own.stop, first + self.expert_bytes)
            if start < stop:
                part[start - own.start : stop - own.start] = flat[start - first : stop - first]
        assert part is not None  # `held` is never empty
        return Nf4Part.of(part, held, self.shape, self.dtype)

    def flatten(self, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """The bytes of consecutive experts from their stored tensors, each with the experts along its first axis."""
        experts = len(stored[0])
        flat_nB = torch.zeros(experts, self.expert_bytes, dtype=torch.uint8, device=stored[0].device)
        for part, tensor in zip(self._parts, stored, strict=True):
            content = tensor.reshape(experts, -1).contiguous().view(torch.uint8)
            flat_nB[:, part.start : part.start + part.size] = content
        return flat_nB.view(-1)

    def views(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The stored tensors of all experts in their bytes, without a copy."""
        flat_EB = flat.view(self.shape[0], self.expert_bytes)
        packed, absmax, nested, offset = (
            flat_EB[:, part.start : part.start + part.size].view(part.dtype) for part in self._parts
        )
        return packed, absmax, nested, offset.squeeze(1)

    def stack(self, flat: torch.Tensor) -> Nf4Stack:
        """The stack in these bytes, without a copy."""
        return Nf4Stack(self.views(flat), self.shape, self.dtype)
