"""`silu(gate) * up` and its backward as one Triton kernel each. Imported on CUDA devices only: CPU wheels lack Triton.

Separate ops read and write the rows a dozen times, partly in float32: a seventh of a step of Mixtral's layers on an
H100, and a quarter of its transient memory. Products are rounded once, sums are float32.

n rows, I intermediate (`width`).
"""

import torch
import triton
from triton import language as tl

_BLOCK = 1024  # columns at a time; 2,048 is as fast


@triton.jit  # type: ignore[untyped-decorator]
def _forward(u_n2I, h_nI, width: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(u_n2I + 2 * row * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(u_n2I + (2 * row + 1) * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(h_nI + row * width + column, (gate * tl.sigmoid(gate) * up).to(h_nI.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    u_n2I, dh_nI, weight_n, gradient_n, du_n2I, width: tl.constexpr, BLOCK: tl.constexpr
):
    """One row; `h` overwrites `dh`."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weight_n + row).to(tl.float32)
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(u_n2I + 2 * row * width + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(u_n2I + (2 * row + 1) * width + column, mask=inside, other=0.0).to(tl.float32)
        dh = tl.load(dh_nI + row * width + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        h = silu * up
        products += dh * h
        tl.store(dh_nI + row * width + column, h.to(dh_nI.dtype.element_ty), mask=inside)
        dh *= weight
        dgate = dh * up * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(du_n2I + 2 * row * width + column, dgate.to(du_n2I.dtype.element_ty), mask=inside)
        tl.store(du_n2I + (2 * row + 1) * width + column, (dh * silu).to(du_n2I.dtype.element_ty), mask=inside)
    tl.store(gradient_n + row, tl.sum(products))


def silu_forward(u_n2I: torch.Tensor) -> torch.Tensor:
    """`h [n, I]`."""
    u_n2I = u_n2I.contiguous()
    n, width = u_n2I.shape[0], u_n2I.shape[1] // 2
    h_nI = u_n2I.new_empty(n, width)
    with torch.cuda.device(u_n2I.device):
        _forward[(n, triton.cdiv(width, _BLOCK))](u_n2I, h_nI, width, _BLOCK)
    return h_nI


def silu_backward(
    u_n2I: torch.Tensor, dh_nI: torch.Tensor, weight_n: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`h` in the memory of `dh`, `<dh, h>` of each row in float32, and `du` of the weighted `dh`."""
    u_n2I, h_nI = u_n2I.contiguous(), dh_nI.contiguous()
    n, width = h_nI.shape
    gradient_n = torch.empty(n, dtype=torch.float32, device=u_n2I.device)
    du_n2I = torch.empty_like(u_n2I)
    with torch.cuda.device(u_n2I.device):
        _backward[(n,)](u_n2I, h_nI, weight_n.contiguous(), gradient_n, du_n2I, width, _BLOCK)
    return h_nI, gradient_n, du_n2I
