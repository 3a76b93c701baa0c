"""Rows sorted by expert, and products of such rows with one matrix an expert.

Two ways to compute the same: `LoopChunk` calls one matrix product an expert (CPU, and GPUs before Hopper: needs the
number of rows of each expert on the host), `GroupedChunk` one grouped product for all of them (no host sync).

R routed rows sorted by expert, n rows of a chunk, E experts, I input features, O output features, r rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch.nn import functional

from finetune.moe.factors import ExpertFactors
from finetune.moe.nf4 import Nf4Stack

# Experts with few rows share a chunk, so that element-wise work is done for all of them at once; more rows would only
# leave the cache and hold more memory.
CHUNK_ROWS = 512


@dataclass(frozen=True)
class Projection:
    """One frozen stack, 4-bit or dense, `[E, O, I]` or transposed `[E, I, O]`; its bias `[E, O]`; its factors."""

    stack: torch.Tensor
    bias: torch.Tensor | None
    transposed: bool
    factors: tuple[ExpertFactors, ...]

    @property
    def out_features(self) -> int:
        """O."""
        return self.stack.shape[2 if self.transposed else 1]

    @property
    def in_features(self) -> int:
        """I."""
        return self.stack.shape[1 if self.transposed else 2]

    def expert_weight(self, expert: int, dtype: torch.dtype, scratch: torch.Tensor | None) -> torch.Tensor:
        """One expert's weight as `[I, O]`; a 4-bit one is dequantised into `scratch`."""
        data = self.stack.data
        weight = data.expert(expert, out=scratch) if isinstance(data, Nf4Stack) else data[expert].to(dtype)
        return weight if self.transposed else weight.T

    def scratch(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Memory for one dequantised expert; None for a dense stack."""
        if not isinstance(self.stack.data, Nf4Stack):
            return None
        return torch.empty(self.stack.shape[1:], dtype=dtype, device=self.stack.device)

    def all_weights(self, dtype: torch.dtype) -> torch.Tensor:
        """All experts' weights as `[E, I, O]`."""
        data = self.stack.data
        dense = data.dequantize() if isinstance(data, Nf4Stack) else data
        return dense.to(dtype) if self.transposed else dense.to(dtype).transpose(1, 2)


class Chunk(Protocol):
    """Consecutive rows, all rows of the experts it holds."""

    rows: slice

    def gather(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Each row's token, `[n, H]`."""
        ...

    def scatter_add(self, out_TH: torch.Tensor, y_nH: torch.Tensor) -> None:
        """Add each row to its token, in place, always in the same order."""
        ...

    def row_bias(self, bias_EO: torch.Tensor) -> torch.Tensor:
        """Each row's bias, `[n, O]`."""
        ...

    def project(self, x_nI: torch.Tensor, projection: Projection, out_nO: torch.Tensor | None = None) -> torch.Tensor:
        """`x W + bias`, without factors."""
        ...

    def project_back(self, g_nO: torch.Tensor, projection: Projection) -> torch.Tensor:
        """`g W^T`, the gradient with respect to the rows."""
        ...

    def factor_down(
        self, x_nI: torch.Tensor, M_SrI: torch.Tensor, factors: ExpertFactors, out_nr: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`x M^T`, `[n, r]`; zero for experts without factors."""
        ...

    def add_factor_up(
        self, y_nO: torch.Tensor, x_nr: torch.Tensor, M_SrO: torch.Tensor, factors: ExpertFactors, scale: float
    ) -> None:
        """`y += scale x M`, in place."""
        ...

    def outer_into(
        self, grad_Sab: torch.Tensor, p_na: torch.Tensor, q_nb: torch.Tensor, factors: ExpertFactors
    ) -> None:
        """`grad = p^T q` for each expert that the chunk holds, in place."""
        ...


class LoopChunk:
    """A few experts, one matrix product each."""

    def __init__(self, experts: Sequence[tuple[int, int, int]], token_R: torch.Tensor) -> None:
        """`experts`: (expert, first row, past its last row), consecutive."""
        first, last = experts[0][1], experts[-1][2]
        self.rows = slice(first, last)
        self.token_n = token_R[self.rows]
        self.parts = [(expert, slice(start - first, stop - first)) for expert, start, stop in experts]

    def gather(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Each row's token."""
        return x_TH.index_select(0, self.token_n)

    def scatter_add(self, out_TH: torch.Tensor, y_nH: torch.Tensor) -> None:
        """Add each row to its token; on a GPU expert by expert, as the order of one token's rows is random there."""
        y_nH = y_nH.to(out_TH.dtype)
        for _, rows in self.parts if y_nH.is_cuda else [(0, slice(None))]:
            out_TH.index_add_(0, self.token_n[rows], y_nH[rows])

    def row_bias(self, bias_EO: torch.Tensor) -> torch.Tensor:
        """Each row's bias."""
        return torch.cat([bias_EO[expert].expand(rows.stop - rows.start, -1) for expert, rows in self.parts])

    def project(self, x_nI: torch.Tensor, projection: Projection, out_nO: torch.Tensor | None = None) -> torch.Tensor:
        """`x W + bias`."""
        y_nO = x_nI.new_empty(x_nI.shape[0], projection.out_features) if out_nO is None else out_nO
        scratch = projection.scratch(x_nI.dtype)
        for expert, rows in self.parts:
            weight_IO = projection.expert_weight(expert, x_nI.dtype, scratch)
            if projection.bias is None:
                torch.mm(x_nI[rows], weight_IO, out=y_nO[rows])
            else:
                torch.addmm(projection.bias[expert].to(x_nI.dtype), x_nI[rows], weight_IO, out=y_nO[rows])
        return y_nO

    def project_back(self, g_nO: torch.Tensor, projection: Projection) -> torch.Tensor:
        """`g W^T`."""
        x_nI = g_nO.new_empty(g_nO.shape[0], projection.in_features)
        scratch = projection.scratch(g_nO.dtype)
        for expert, rows in self.parts:
            torch.mm(g_nO[rows], projection.expert_weight(expert, g_nO.dtype, scratch).T, out=x_nI[rows])
        return x_nI

    def _adapted(self, factors: ExpertFactors) -> list[tuple[int, slice]]:
        """(row of the factors, rows of the chunk) of each expert that has factors."""
        if factors.experts is None:
            return self.parts
        return [(factors.experts.index(expert), rows) for expert, rows in self.parts if expert in factors.experts]

    def factor_down(
        self, x_nI: torch.Tensor, M_SrI: torch.Tensor, factors: ExpertFactors, out_nr: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`x M^T`."""
        y_nr = x_nI.new_empty(x_nI.shape[0], M_SrI.shape[1]) if out_nr is None else out_nr
        if factors.experts is not None:
            y_nr.zero_()
        for index, rows in self._adapted(factors):
            torch.mm(x_nI[rows], M_SrI[index].T, out=y_nr[rows])
        return y_nr

    def add_factor_up(
        self, y_nO: torch.Tensor, x_nr: torch.Tensor, M_SrO: torch.Tensor, factors: ExpertFactors, scale: float
    ) -> None:
        """`y += scale x M`."""
        for index, rows in self._adapted(factors):
            y_nO[rows].addmm_(x_nr[rows], M_SrO[index], alpha=scale)

    def outer_into(
        self, grad_Sab: torch.Tensor, p_na: torch.Tensor, q_nb: torch.Tensor, factors: ExpertFactors
    ) -> None:
        """`grad[e] = p_e^T q_e`."""
        for index, rows in self._adapted(factors):
            torch.mm(p_na[rows].T, q_nb[rows], out=grad_Sab[index])


class GroupedChunk:
    """All experts at once through `grouped_mm`: bfloat16 on Hopper and later without a host sync; any CPU, for tests.

    Factors must have one row an expert (`ExpertFactors.spread`).
    """

    def __init__(self, order_R: torch.Tensor, offsets_E: torch.Tensor, top_k: int) -> None:
        """`order_R`: rows (token * K + choice) sorted by expert; `offsets_E`: past each expert's last row."""
        self.rows = slice(0, order_R.shape[0])
        self.token_R, self.top_k = order_R // top_k, top_k
        self.position_R = torch.empty_like(order_R).scatter_(
            0, order_R, torch.arange(order_R.shape[0], device=order_R.device)
        )
        self.offsets_E = offsets_E

    def gather(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Each row's token."""
        return x_TH.index_select(0, self.token_R)

    def scatter_add(self, out_TH: torch.Tensor, y_nH: torch.Tensor) -> None:
        """Add each token's K rows, by choice."""
        y_TKH = y_nH.index_select(0, self.position_R).view(-1, self.top_k, y_nH.shape[-1])
        out_TH += y_TKH.sum(1, dtype=out_TH.dtype)

    def row_bias(self, bias_EO: torch.Tensor) -> torch.Tensor:
        """Each row's bias."""
        row_R = torch.arange(self.rows.stop, device=bias_EO.device)
        return bias_EO[torch.searchsorted(self.offsets_E, row_R, right=True)]

    def project(self, x_nI: torch.Tensor, projection: Projection, out_nO: torch.Tensor | None = None) -> torch.Tensor:
        """`x W + bias`."""
        y_nO = functional.grouped_mm(x_nI, projection.all_weights(x_nI.dtype), offs=self.offsets_E)
        if projection.bias is not None:
            y_nO += self.row_bias(projection.bias.to(y_nO.dtype))
        return y_nO if out_nO is None else out_nO.copy_(y_nO)

    def project_back(self, g_nO: torch.Tensor, projection: Projection) -> torch.Tensor:
        """`g W^T`."""
        return functional.grouped_mm(g_nO, projection.all_weights(g_nO.dtype).transpose(1, 2), offs=self.offsets_E)

    def factor_down(
        self, x_nI: torch.Tensor, M_SrI: torch.Tensor, factors: ExpertFactors, out_nr: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`x M^T`."""
        y_nr = functional.grouped_mm(x_nI, M_SrI.transpose(1, 2), offs=self.offsets_E)
        return y_nr if out_nr is None else out_nr.copy_(y_nr)

    def add_factor_up(
        self, y_nO: torch.Tensor, x_nr: torch.Tensor, M_SrO: torch.Tensor, factors: ExpertFactors, scale: float
    ) -> None:
        """`y += scale x M`."""
        y_nO.add_(functional.grouped_mm(x_nr, M_SrO, offs=self.offsets_E), alpha=scale)

    def outer_into(
        self, grad_Sab: torch.Tensor, p_na: torch.Tensor, q_nb: torch.Tensor, factors: ExpertFactors
    ) -> None:
        """`grad = p^T q` by expert."""
        grad_Sab.copy_(functional.grouped_mm(p_na.T, q_nb, offs=self.offsets_E))


def loop_chunks(bounds: Sequence[int], token_R: torch.Tensor) -> list[Chunk]:
    """Chunks of up to `CHUNK_ROWS` rows (or one expert); expert e has the rows from `bounds[e]` to `bounds[e + 1]`."""
    chunks: list[Chunk] = []
    held: list[tuple[int, int, int]] = []
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        if held and stop - held[0][1] > CHUNK_ROWS:
            chunks.append(LoopChunk(held, token_R))
            held = []
        if stop > start:
            held.append((expert, start, stop))
    return [*chunks, LoopChunk(held, token_R)] if held else chunks
