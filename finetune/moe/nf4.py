"""4-bit NF4 storage of stacked experts. `finetune.moe.nf4_loading` fills it while the checkpoint's shards stream in.

Format: QLoRA (arXiv 2305.14314), bitsandbytes' NF4 with blocks of 64 values and double quantisation of the block
maxima, expert by expert.

E experts, O output features, I input features, Q quantisation blocks of one expert.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from ctypes import c_longlong, c_void_p
from functools import cache
from typing import Any

import torch
from bitsandbytes.functional import create_dynamic_map, quantize_blockwise

from finetune.errors import Problem, WeightsError
from finetune.upstream import native_dequantize, private

_dequantize_out = private("torch:ops.bitsandbytes.dequantize_4bit.out")
_make_subclass = private("torch:Tensor._make_wrapper_subclass")
_to_copy_operation = private("torch:ops.aten._to_copy.default")

BLOCKSIZE = 64  # values per quantisation block
NESTED_BLOCKSIZE = 256  # maxima per second-level block
CHUNK = 1 << 17  # values quantised at once on the CPU, whole blocks: bitsandbytes needs 20 bytes a value meanwhile
CUDA_CHUNK = 1 << 30  # its kernels need none, but count in int32

_SUFFIX = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # what bitsandbytes reads and writes


@cache
def _absmax_code(device: torch.device) -> torch.Tensor:
    """The 256 values of a quantised block maximum."""
    code: torch.Tensor = create_dynamic_map().to(device)
    return code


def quantize_matrix(weight_OI: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """One expert as `Nf4Stack` stores it: the bits of bitsandbytes' `quantize_4bit(compress_statistics=True)`."""
    return quantize_pieces(torch.split(weight_OI.reshape(-1), CHUNK if weight_OI.device.type == "cpu" else CUDA_CHUNK))


def quantize_pieces(pieces: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The same for a matrix given in flat pieces; every piece except the last ends at a block boundary."""
    operation = torch.ops.bitsandbytes.quantize_4bit.default
    packed, maxima = [], []
    for piece in pieces:
        readable = piece if piece.dtype in _SUFFIX else piece.float()
        packed_N, maxima_Q = operation(readable, BLOCKSIZE, "nf4", torch.uint8)
        packed.append(packed_N.view(-1))
        maxima.append(maxima_Q)
    maxima_Q = torch.cat(maxima)
    offset = maxima_Q.mean()
    absmax_Q, nested = quantize_blockwise(maxima_Q - offset, blocksize=NESTED_BLOCKSIZE)
    return torch.cat(packed), absmax_Q, nested.absmax, offset


def _block_maxima(absmax_EQ: torch.Tensor, nested_absmax_ES: torch.Tensor, offset_E: torch.Tensor) -> torch.Tensor:
    """The block maxima of some experts, float32 `[E, Q]`."""
    code = _absmax_code(absmax_EQ.device)
    # Those of a sharded model are views into the bytes of all experts.
    absmax_EQ, nested_absmax_ES = absmax_EQ.contiguous(), nested_absmax_ES.contiguous()
    native = native_dequantize("fp32") if absmax_EQ.device.type == "cpu" else None
    if absmax_EQ.shape[1] % NESTED_BLOCKSIZE == 0:  # no block spans two experts: one call for all
        pairs = [(absmax_EQ, nested_absmax_ES)]
    else:
        pairs = list(zip(absmax_EQ, nested_absmax_ES, strict=True))
    maxima_EQ = torch.empty(absmax_EQ.shape, dtype=torch.float32, device=absmax_EQ.device)
    for (absmax, nested), maxima in zip(pairs, [maxima_EQ] if len(pairs) == 1 else maxima_EQ, strict=True):
        if native is None:
            operation = torch.ops.bitsandbytes.dequantize_blockwise.default
            maxima.copy_(operation(absmax, nested, code, NESTED_BLOCKSIZE, torch.float32))
        else:
            pointers = (c_void_p(tensor.data_ptr()) for tensor in (code, absmax, nested, maxima))
            native(*pointers, c_longlong(NESTED_BLOCKSIZE), c_longlong(maxima.numel()))
    return maxima_EQ.add_(offset_E.unsqueeze(1))


def _dequantize_into(out_OI: torch.Tensor, packed_N: torch.Tensor, maxima_Q: torch.Tensor) -> None:
    """Write one NF4 matrix into `out_OI`.

    bitsandbytes 0.50 counts blocks row by row on CPUs with AVX512: rows that are not whole blocks would get the wrong
    maxima. Blocks do not depend on the rows of the matrix, so the C function is called with other row lengths.
    """
    shape, dtype, device = out_OI.shape, out_OI.dtype, out_OI.device.type
    native = native_dequantize(f"nf4_{_SUFFIX[dtype]}") if device == "cpu" and shape.numel() % 2 == 0 else None
    if native is not None:
        pointers = (c_void_p(tensor.data_ptr()) for tensor in (packed_N, maxima_Q, out_OI))
        whole = shape[1] if shape[1] % BLOCKSIZE == 0 else BLOCKSIZE
        rows, columns = (shape.numel() // whole, whole) if shape.numel() % whole == 0 else (1, shape.numel())
        native(*pointers, c_longlong(BLOCKSIZE), c_longlong(rows), c_longlong(columns))
    elif device == "cuda":
        _dequantize_out(packed_N, maxima_Q, BLOCKSIZE, "nf4", shape, dtype, out=out_OI)
    else:
        operation = torch.ops.bitsandbytes.dequantize_4bit.default
        out_OI.copy_(operation(packed_N, maxima_Q, BLOCKSIZE, "nf4", shape, dtype))


def linear_weight(weight: Any) -> torch.Tensor:
    """The dequantised weight [O, I] of a `Linear4bit`, in the type it was quantised from."""
    state = weight.quant_state
    dense_OI = torch.empty(state.shape, dtype=state.dtype, device=weight.device)
    maxima = _block_maxima(state.absmax[None], state.state2.absmax[None], state.offset.reshape(1))[0]
    _dequantize_into(dense_OI, weight.data.view(-1), maxima)
    return dense_OI


def stored_sizes(values: int) -> tuple[tuple[int, torch.dtype], ...]:
    """Number and dtype of the elements that `Nf4Stack` stores of one expert with so many values, in its order."""
    blocks = -(-values // BLOCKSIZE)
    nested = -(-blocks // NESTED_BLOCKSIZE)
    return (-(-values // 2), torch.uint8), (blocks, torch.uint8), (nested, torch.float32), (1, torch.float32)


class Nf4Stack(torch.Tensor):
    """A frozen expert stack that looks like `[E, O, I]` in `dtype` and holds 4.13 bits a value.

    `expert(e)` gives one dequantised matrix `[O, I]`, `dequantize()` the dense stack. Moving it and changing its dtype
    keep the stored bits; any other operation raises WeightsError, because its result would be dense. Experts are
    quantised one by one: a block never spans two experts, and bitsandbytes, which counts elements in int32, never sees
    a stack.
    """

    packed_EN: torch.Tensor  # uint8 [E, ceil(O*I/2)]
    absmax_EQ: torch.Tensor  # uint8 [E, Q], quantised block maxima
    nested_absmax_ES: torch.Tensor  # float32 [E, ceil(Q/256)]
    offset_E: torch.Tensor  # float32 [E], mean of the block maxima

    @staticmethod
    def __new__(cls, inner: tuple[torch.Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> "Nf4Stack":
        stack: Nf4Stack = _make_subclass(cls, shape, dtype=dtype, device=inner[0].device, requires_grad=False)
        return stack

    def __init__(self, inner: tuple[torch.Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> None:
        self.packed_EN, self.absmax_EQ, self.nested_absmax_ES, self.offset_E = inner

    @classmethod
    def quantize(cls, weight_EOI: torch.Tensor) -> "Nf4Stack":
        """Quantise a dense stack; the result's dtype is the stack's own."""
        return cls.from_experts(weight_EOI, weight_EOI.shape[0])

    @classmethod
    def from_experts(cls, experts: Iterable[torch.Tensor], num_experts: int) -> "Nf4Stack":
        """Quantise `num_experts` matrices `[O, I]` of one shape and dtype from an iterator, on their own device."""
        inner: tuple[torch.Tensor, ...] = ()
        shape, dtype, count = torch.Size(), torch.float32, 0
        for count, weight_OI in enumerate(experts, start=1):
            parts = quantize_matrix(weight_OI)
            if count == 1:
                inner = tuple(part.new_empty((num_experts, *part.shape)) for part in parts)
                shape, dtype = weight_OI.shape, weight_OI.dtype
            if count > num_experts or weight_OI.shape != shape:
                raise ValueError(f"expert {count} of {num_experts} is {tuple(weight_OI.shape)}, others {tuple(shape)}")
            for whole, part in zip(inner, parts, strict=True):
                whole[count - 1] = part
        if count != num_experts:
            raise ValueError(f"{count} experts came where {num_experts} are needed")
        return cls(inner, torch.Size((num_experts, *shape)), dtype)

    @property
    def stored(self) -> tuple[torch.Tensor, ...]:
        """The stored tensors, in constructor order."""
        return (self.packed_EN, self.absmax_EQ, self.nested_absmax_ES, self.offset_E)

    @property
    def stored_bytes(self) -> int:
        """Bytes held, quantisation constants included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.stored)

    def maxima(self, experts: slice) -> torch.Tensor:
        """The block maxima of some experts, float32 `[n, Q]`: the input of `expert`, computed for several at once."""
        return _block_maxima(self.absmax_EQ[experts], self.nested_absmax_ES[experts], self.offset_E[experts])

    def expert(self, index: int, out: torch.Tensor | None = None, maxima_Q: torch.Tensor | None = None) -> torch.Tensor:
        """One expert's weight `[O, I]`: written into `out` (contiguous, any float dtype), else into fresh memory."""
        if out is None:
            out = torch.empty(self.shape[1:], dtype=self.dtype, device=self.packed_EN.device)
        if out.shape != self.shape[1:] or not out.is_contiguous():
            raise ValueError(f"out must be contiguous {tuple(self.shape[1:])}, got {tuple(out.shape)}, {out.stride()}")
        if out.dtype not in _SUFFIX:  # bitsandbytes writes 32 and 16 bits
            return out.copy_(self.expert(index, torch.empty_like(out, dtype=torch.float32), maxima_Q))
        if maxima_Q is None:
            maxima_Q = self.maxima(slice(index, index + 1))[0]
        _dequantize_into(out, self.packed_EN[index], maxima_Q)
        return out

    def rows(self, index: int, start: int, stop: int, maxima_Q: torch.Tensor | None = None) -> torch.Tensor:
        """Rows `start:stop` of one expert's weight; only the blocks that contain them are dequantised."""
        columns, values = self.shape[2], self.shape[1] * self.shape[2]
        if maxima_Q is None:
            maxima_Q = self.maxima(slice(index, index + 1))[0]
        first, past = start * columns // BLOCKSIZE, -(-stop * columns // BLOCKSIZE)
        begin, end = first * BLOCKSIZE, min(past * BLOCKSIZE, values)
        out = torch.empty((1, end - begin), dtype=self.dtype, device=self.packed_EN.device)
        _dequantize_into(out, self.packed_EN[index, begin // 2 : -(-end // 2)], maxima_Q[first:past])
        return out[0, start * columns - begin : stop * columns - begin].view(-1, columns)

    def dequantize(self) -> torch.Tensor:
        """The dense stack `[E, O, I]`."""
        dense_EOI = torch.empty(self.shape, dtype=self.dtype, device=self.packed_EN.device)
        for index, (dense_OI, maxima_Q) in enumerate(zip(dense_EOI, self.maxima(slice(None)), strict=True)):
            self.expert(index, dense_OI, maxima_Q)
        return dense_EOI

    def __deepcopy__(self, memo: dict[int, Any]) -> "Nf4Stack":
        return _like(self, tuple(deepcopy(tensor, memo) for tensor in self.stored), self.dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Nf4Stack(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.Size, torch.dtype]]:
        return ["packed_EN", "absmax_EQ", "nested_absmax_ES", "offset_E"], (self.shape, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, torch.Tensor], meta: tuple[torch.Size, torch.dtype], *_: Any
    ) -> "Nf4Stack":
        return Nf4Stack(tuple(inner.values()), *meta)

    __torch_function__ = private("torch:_C._disabled_torch_function_impl")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _STRUCTURAL:
            return _STRUCTURAL[func](*args, **(kwargs or {}))
        raise WeightsError(
            Problem(
                "4-bit expert stack",
                "an operation would make the stack dense, split it, or write to it",
                "report this; code that wants dense values calls dequantize() or expert()",
                got=str(func),
            )
        )


class Nf4Part(Nf4Stack):
    """This process's part of a stack's bytes (`finetune.moe.stored_bytes`), before the model is sharded.

    It looks like the whole stack; asking for values raises WeightsError. `held`: the experts that the part touches.
    """

    flat: torch.Tensor
    held: range

    def __init__(self, inner: tuple[torch.Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> None:
        (self.flat,) = inner

    @classmethod
    def of(cls, flat: torch.Tensor, held: range, shape: torch.Size, dtype: torch.dtype) -> "Nf4Part":
        """`shape`: of the whole stack."""
        part = cls((flat,), shape, dtype)
        part.held = held
        return part

    @property
    def stored(self) -> tuple[torch.Tensor, ...]:
        """The bytes."""
        return (self.flat,)

    def maxima(self, experts: slice) -> torch.Tensor:
        """Raises WeightsError."""
        raise self._unsharded()

    def expert(self, index: int, out: torch.Tensor | None = None, maxima_Q: torch.Tensor | None = None) -> torch.Tensor:
        """Raises WeightsError."""
        raise self._unsharded()

    def rows(self, index: int, start: int, stop: int, maxima_Q: torch.Tensor | None = None) -> torch.Tensor:
        """Raises WeightsError."""
        raise self._unsharded()

    def dequantize(self) -> torch.Tensor:
        """Raises WeightsError."""
        raise self._unsharded()

    def _unsharded(self) -> WeightsError:
        what = f"this process holds {len(self.held)} of {self.shape[0]} experts, and the model is not sharded yet"
        return WeightsError(Problem("4-bit expert stack", what, "call finetune.moe.sharding.shard_model(model) first"))


def _like(stack: Nf4Stack, inner: tuple[torch.Tensor, ...], dtype: torch.dtype) -> Nf4Stack:
    same = type(stack)(inner, stack.shape, dtype)
    if isinstance(stack, Nf4Part) and isinstance(same, Nf4Part):
        same.held = stack.held
    return same


def _same(stack: Nf4Stack, **_: Any) -> Nf4Stack:
    return _like(stack, stack.stored, stack.dtype)


def _to_copy(
    stack: Nf4Stack, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **_: Any
) -> Nf4Stack:
    """Move to a device, or change the dtype that `expert` produces; the stored bits stay as they are."""
    return _like(stack, tuple(tensor.to(device) for tensor in stack.stored), dtype or stack.dtype)


_STRUCTURAL: dict[Any, Callable[..., Nf4Stack]] = {
    torch.ops.aten.detach.default: _same,
    torch.ops.aten.alias.default: _same,
    _to_copy_operation: _to_copy,
}
