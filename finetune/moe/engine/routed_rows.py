"""Rows sorted by expert, and products of such rows with one matrix an expert.

Two implementations: `LoopChunk` runs one matrix product per expert (CPU, and GPUs before Hopper; needs the number of
rows of each expert on the host), `GroupedChunk` one grouped product for all of them (no host sync). `Factors` holds the
LoRA factors of one expert stack in the engine's layout.

R routed rows sorted by expert, n rows of a chunk, E experts, S experts with factors, I input features, O output
features, r rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import torch
from torch.nn import functional

from finetune.moe.dropout import InputDropout
from finetune.moe.nf4 import Nf4Stack


@dataclass(frozen=True)
class ExpertFactors:
    """`A [S, r, I]`, `B^T` as `B [S, r, O]`, and the scale of `B A`; `experts`: the expert of each row, None: all.

    Both have r rows: products with a short inner or outer side are up to eight times faster that way on a CPU.
    `dropout`: of the input of `A`.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    dropout: InputDropout | None = None
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


@dataclass(frozen=True)
class ChunkSize:
    """Maximum number of rows in a chunk.

    Experts with few rows share a chunk, so that element-wise work runs once for all of them. The rows of a busy expert
    are split to keep intermediate tensors small; each piece reads the weight once more.
    """

    shared: int  # maximum rows of a chunk that holds several experts
    single: int  # maximum rows of a chunk that holds one expert

    @classmethod
    def for_columns(cls, columns: int, on_gpu: bool) -> "ChunkSize":
        """For a first projection with `columns` outputs; measured (benchmarks/LOG.md)."""
        if on_gpu:
            return cls(shared=1, single=2**14)
        return cls(shared=min(3 * 2**16 // columns, 512), single=columns // 8 + 64)


PIECE = 2**28
"""Most rows times columns of the first projection in a piece of many rows: 0.5 GiB in 16 bits."""


def pieces_of(rows: int, columns: int) -> int:
    """Into how many pieces rows are cut for grouped products: one up to two times `PIECE`.

    A cut costs a second dequantised stack (both are then held for all pieces), which pays for more than that.
    """
    return 1 if rows * columns <= 2 * PIECE else -(-rows * columns // PIECE)


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


class Weights:
    """A projection's weights in the dtype of one pass; a 4-bit expert is dequantised once for consecutive chunks.

    `hold`: a whole dequantised stack is kept for further chunks.
    """

    def __init__(self, projection: Projection, dtype: torch.dtype, hold: bool = False) -> None:
        self.projection, self.dtype, self.hold = projection, dtype, hold
        self._all: torch.Tensor | None = None
        self.data = projection.stack.data
        self._scratch: torch.Tensor | None = None
        self._held: int | None = None  # the expert in `_scratch`

    def of(self, experts: range) -> Iterator[torch.Tensor]:
        """Consecutive experts' weights `[I, O]`, each valid until the next: 4-bit ones share their memory."""
        transposed, data = self.projection.transposed, self.data
        if not isinstance(data, Nf4Stack):
            dense_nOI = data[experts.start : experts.stop].to(self.dtype)
            yield from (dense_nOI if transposed else dense_nOI.transpose(1, 2)).unbind(0)
            return
        if self._scratch is None:
            self._scratch = torch.empty(data.shape[1:], dtype=self.dtype, device=data.device)
        weight_IO = self._scratch if transposed else self._scratch.T
        if self._held == experts.start == experts.stop - 1:
            yield weight_IO
            return
        for expert, maxima_Q in zip(experts, data.maxima(slice(experts.start, experts.stop)).unbind(0), strict=True):
            data.expert(expert, self._scratch, maxima_Q)
            self._held = expert
            yield weight_IO

    def all(self) -> torch.Tensor:
        """All experts' weights as `[E, I, O]`."""
        if self._all is not None:
            return self._all
        dense = self.data.dequantize() if isinstance(self.data, Nf4Stack) else self.data
        all_EIO = dense.to(self.dtype) if self.projection.transposed else dense.to(self.dtype).transpose(1, 2)
        if self.hold:
            self._all = all_EIO
        return all_EIO


class Chunk(Protocol):
    """Consecutive rows: of several experts, or some rows of one."""

    rows: slice
    sums_in_float32: ClassVar[bool]  # whether `add_outer` also takes a float32 sum of products in 16 bits

    def gather(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Each row's token, `[n, H]`."""
        ...

    def scatter_add(self, out_TH: torch.Tensor, y_nH: torch.Tensor) -> None:
        """Add each row to its token, in place, always in the same order."""
        ...

    def row_bias(self, bias_EO: torch.Tensor) -> torch.Tensor:
        """Each row's bias, `[n, O]`."""
        ...

    def project(self, x_nI: torch.Tensor, weights: Weights) -> torch.Tensor:
        """`x W + bias`, without factors."""
        ...

    def project_back(self, g_nO: torch.Tensor, weights: Weights) -> torch.Tensor:
        """`g W^T`, the gradient with respect to the rows."""
        ...

    def factor_down(self, x_nI: torch.Tensor, M_SrI: torch.Tensor, factors: ExpertFactors) -> torch.Tensor:
        """`x M^T`, `[n, r]`; zero for experts without factors."""
        ...

    def add_factor_up(
        self, y_nO: torch.Tensor, x_nr: torch.Tensor, M_SrO: torch.Tensor, factors: ExpertFactors, scale: float
    ) -> None:
        """`y += scale x M`, in place."""
        ...

    def add_outer(self, grad_SrI: torch.Tensor, p_nr: torch.Tensor, q_nI: torch.Tensor, factors: ExpertFactors) -> None:
        """`grad += p^T q` for each expert that the chunk holds, in place."""
        ...


class LoopChunk:
    """Some consecutive experts, one matrix product each."""

    sums_in_float32: ClassVar[bool] = False

    def __init__(self, first_expert: int, bounds: Sequence[int], token_R: torch.Tensor) -> None:
        """`bounds`: the first row of each expert, and the row past the last one's last."""
        self.rows = slice(bounds[0], bounds[-1])
        self.token_n = token_R[self.rows]
        self.sizes = [stop - start for start, stop in pairwise(bounds)]
        self.experts = range(first_expert, first_expert + len(self.sizes))

    def gather(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Each row's token."""
        return x_TH.index_select(0, self.token_n)

    def scatter_add(self, out_TH: torch.Tensor, y_nH: torch.Tensor) -> None:
        """Add each row to its token; on a GPU expert by expert, as the order of one token's rows is random there."""
        sizes = self.sizes if y_nH.is_cuda else [len(self.token_n)]
        for token, y in zip(torch.split(self.token_n, sizes), torch.split(y_nH.to(out_TH.dtype), sizes), strict=True):
            out_TH.index_add_(0, token, y)

    def row_bias(self, bias_EO: torch.Tensor) -> torch.Tensor:
        """Each row's bias."""
        biases = bias_EO[self.experts.start : self.experts.stop].unbind(0)
        return torch.cat([bias.expand(size, -1) for bias, size in zip(biases, self.sizes, strict=True)])

    def project(self, x_nI: torch.Tensor, weights: Weights) -> torch.Tensor:
        """`x W + bias`."""
        projection = weights.projection
        y_nO = x_nI.new_empty(x_nI.shape[0], projection.out_features)
        for x, y, weight_IO in self._with_weights(x_nI, y_nO, weights):
            torch.mm(x, weight_IO, out=y)
        if projection.bias is not None:
            y_nO += self.row_bias(projection.bias).to(y_nO.dtype)
        return y_nO

    def project_back(self, g_nO: torch.Tensor, weights: Weights) -> torch.Tensor:
        """`g W^T`."""
        x_nI = g_nO.new_empty(g_nO.shape[0], weights.projection.in_features)
        for g, x, weight_IO in self._with_weights(g_nO, x_nI, weights):
            torch.mm(g, weight_IO.T, out=x)
        return x_nI

    def _with_weights(self, a: torch.Tensor, b: torch.Tensor, weights: Weights) -> Iterator[tuple[torch.Tensor, ...]]:
        """Each expert's rows of `a` and `b`, and its weight."""
        return zip(torch.split(a, self.sizes), torch.split(b, self.sizes), weights.of(self.experts), strict=True)

    def _rows(self, factors: ExpertFactors, *rows: torch.Tensor, matrices: torch.Tensor) -> Iterator[tuple[Any, ...]]:
        """For each expert that has factors: its part of each of `rows`, and its matrix."""
        parts = zip(*(torch.split(tensor, self.sizes) for tensor in rows), strict=True)
        if factors.experts is None:
            yield from zip(parts, matrices[self.experts.start : self.experts.stop].unbind(0), strict=True)
            return
        for expert, part in zip(self.experts, parts, strict=True):
            if expert in factors.row:
                yield part, matrices[factors.row[expert]]

    def factor_down(self, x_nI: torch.Tensor, M_SrI: torch.Tensor, factors: ExpertFactors) -> torch.Tensor:
        """`x M^T`."""
        new = x_nI.new_empty if factors.experts is None else x_nI.new_zeros
        y_nr = new(x_nI.shape[0], M_SrI.shape[1])
        for (x, y), M_Ir in self._rows(factors, x_nI, y_nr, matrices=M_SrI.transpose(1, 2)):
            torch.mm(x, M_Ir, out=y)
        return y_nr

    def add_factor_up(
        self, y_nO: torch.Tensor, x_nr: torch.Tensor, M_SrO: torch.Tensor, factors: ExpertFactors, scale: float
    ) -> None:
        """`y += scale x M`."""
        for (x, y), M_rO in self._rows(factors, x_nr, y_nO, matrices=M_SrO):
            y.addmm_(x, M_rO, alpha=scale)

    def add_outer(self, grad_SrI: torch.Tensor, p_nr: torch.Tensor, q_nI: torch.Tensor, factors: ExpertFactors) -> None:
        """`grad[e] += p_e^T q_e`."""
        for (p, q), grad_rI in self._rows(factors, p_nr, q_nI, matrices=grad_SrI):
            grad_rI.addmm_(p.T, q)


_SPREAD_COLUMNS = 256  # up to this width the product is bound by reading and writing its result


class GroupedChunk:
    """All rows of consecutive tokens through `grouped_mm`: bfloat16 on Hopper and later without a host sync; any CPU,
    for tests.

    Factors must have one row an expert (`ExpertFactors.spread`).
    """

    sums_in_float32: ClassVar[bool] = True

    def __init__(self, order_n: torch.Tensor, offsets_E: torch.Tensor, top_k: int, first_token: int = 0) -> None:
        """`order_n`: rows ((token - first) * K + choice) sorted by expert; `offsets_E`: past each expert's last one."""
        first_row, count = first_token * top_k, order_n.shape[0]
        self.rows = slice(first_row, first_row + count)
        self.tokens = slice(first_token, first_token + count // top_k)
        self.token_n, self.top_k = order_n // top_k, top_k
        row_n = torch.arange(count, device=order_n.device)
        self.position_n = torch.empty_like(order_n).scatter_(0, order_n, row_n)
        self.offsets_E = offsets_E
        self.expert_n = torch.searchsorted(offsets_E, row_n, right=True)

    def gather(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Each row's token."""
        return x_TH[self.tokens].index_select(0, self.token_n)

    def scatter_add(self, out_TH: torch.Tensor, y_nH: torch.Tensor) -> None:
        """Add each token's K rows, by choice: a token has all its rows in one piece."""
        y_tKH = y_nH.index_select(0, self.position_n).view(-1, self.top_k, y_nH.shape[-1])
        out_TH[self.tokens] += y_tKH.sum(1, dtype=out_TH.dtype)

    def row_bias(self, bias_EO: torch.Tensor) -> torch.Tensor:
        """Each row's bias."""
        return bias_EO[self.expert_n]

    def project(self, x_nI: torch.Tensor, weights: Weights) -> torch.Tensor:
        """`x W + bias`."""
        y_nO = functional.grouped_mm(x_nI, weights.all(), offs=self.offsets_E)
        if weights.projection.bias is not None:
            y_nO += self.row_bias(weights.projection.bias.to(y_nO.dtype))
        return y_nO

    def project_back(self, g_nO: torch.Tensor, weights: Weights) -> torch.Tensor:
        """`g W^T`."""
        return functional.grouped_mm(g_nO, weights.all().transpose(1, 2), offs=self.offsets_E)

    def factor_down(self, x_nI: torch.Tensor, M_SrI: torch.Tensor, factors: ExpertFactors) -> torch.Tensor:
        """`x M^T`."""
        return functional.grouped_mm(x_nI, M_SrI.transpose(1, 2), offs=self.offsets_E)

    def add_factor_up(
        self, y_nO: torch.Tensor, x_nr: torch.Tensor, M_SrO: torch.Tensor, factors: ExpertFactors, scale: float
    ) -> None:
        """`y += scale x M`.

        Few and narrow factors take one dense product: each row has its r values in the columns of its expert and zeros
        elsewhere. A grouped product cannot accumulate into `y`: its result would be written and read once more.
        """
        experts, rank, _ = M_SrO.shape
        if experts * rank > _SPREAD_COLUMNS:
            y_nO.add_(functional.grouped_mm(x_nr, M_SrO, offs=self.offsets_E), alpha=scale)
            return
        own_nE = self.expert_n[:, None] == torch.arange(experts, device=x_nr.device)
        spread_nc = (own_nE[:, :, None] * x_nr[:, None, :]).flatten(1)
        y_nO.addmm_(spread_nc, M_SrO.flatten(0, 1), alpha=scale)

    def add_outer(self, grad_SrI: torch.Tensor, p_nr: torch.Tensor, q_nI: torch.Tensor, factors: ExpertFactors) -> None:
        """`grad += p^T q` by expert."""
        grad_SrI.add_(functional.grouped_mm(p_nr.T, q_nI, offs=self.offsets_E))


def grouped_chunks(index_TK: torch.Tensor, num_experts: int, pieces: int) -> tuple[torch.Tensor, list[Chunk]]:
    """The rows (token * K + choice) of each piece sorted by expert, and one chunk a piece, without a host sync."""
    (tokens, top_k), device = index_TK.shape, index_TK.device
    orders, chunks = [], []
    for first, past in pairwise(tokens * piece // pieces for piece in range(pieces + 1)):
        expert_n, order_n = index_TK[first:past].reshape(-1).sort(stable=True)
        past_E = torch.searchsorted(expert_n, torch.arange(num_experts, device=device), right=True)
        orders.append(order_n + first * top_k if first else order_n)
        chunks.append(GroupedChunk(order_n, past_E.to(torch.int32), top_k, first))
    return torch.cat(orders) if pieces > 1 else orders[0], [*chunks]


def loop_chunks(bounds: Sequence[int], token_R: torch.Tensor, size: ChunkSize) -> list[Chunk]:
    """The chunks of all rows; expert e has the rows from `bounds[e]` to `bounds[e + 1]`."""
    chunks: list[Chunk] = []
    first = 0  # expert
    for expert in range(1, len(bounds)):
        is_last = expert == len(bounds) - 1
        if is_last or bounds[expert + 1] - bounds[first] > size.shared:
            chunks += _chunks_of(first, bounds[first : expert + 1], token_R, size)
            first = expert
    return chunks


def _chunks_of(first: int, bounds: Sequence[int], token_R: torch.Tensor, size: ChunkSize) -> Iterator[LoopChunk]:
    """One chunk of a few experts; equal pieces of one that has too many rows."""
    rows = bounds[-1] - bounds[0]
    pieces = -(-rows // size.single)
    if pieces > 1 and len(bounds) == 2:
        edges = [bounds[0] + rows * piece // pieces for piece in range(pieces + 1)]
        yield from (LoopChunk(first, piece, token_R) for piece in pairwise(edges))
    elif rows:
        yield LoopChunk(first, bounds, token_R)
