"""4-bit NF4 storage of stacked experts, quantised while the checkpoint's shards stream in.

`load_in_4bit` of transformers replaces `nn.Linear` only; a Mixtral keeps 96 % of its weights in stacked parameters
`[E, O, I]`, which stay in 16 bits. Here the same quantiser also covers the stacks. Format: QLoRA (arXiv 2305.14314),
bitsandbytes' NF4 with blocks of 64 values and double quantisation of the block maxima.

E experts, O output features, I input features, Q quantisation blocks of one expert.
"""

from collections.abc import Callable, Mapping
from ctypes import c_longlong, c_void_p
from functools import cache
from typing import Any

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.functional import create_dynamic_map, quantize_4bit
from bitsandbytes.nn import Linear4bit
from torch.utils import _pytree as pytree
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from finetune.errors import Problem, WeightsError

BLOCKSIZE = 64  # values that share one maximum
NESTED_BLOCKSIZE = 256  # maxima that share one second-level maximum
QUANT_METHOD = "moe_nf4"


_SUFFIX = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # what bitsandbytes can write


@cache
def _absmax_code(device: torch.device) -> torch.Tensor:
    """The 256 values of a quantised block maximum."""
    code: torch.Tensor = create_dynamic_map().to(device)
    return code


def _native(name: str) -> Any:
    """bitsandbytes' own C function for the CPU; None where its library lacks it.

    Its operations with `out` exist for CUDA only (0.50). On the CPU they allocate, and fresh memory costs more than the
    arithmetic does; so the C function is called the way the operation calls it.
    """
    return getattr(bnb.lib, f"cdequantize_blockwise_cpu_{name}", None)


def _block_maxima(absmax_EQ: torch.Tensor, nested_absmax_ES: torch.Tensor, offset_E: torch.Tensor) -> torch.Tensor:
    """The block maxima of some experts, float32 `[E, Q]`."""
    code = _absmax_code(absmax_EQ.device)
    native = _native("fp32") if absmax_EQ.device.type == "cpu" else None
    if absmax_EQ.shape[1] % NESTED_BLOCKSIZE == 0:  # no block straddles two experts: all of them in one call
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
    """Write one NF4 matrix into `out_OI`; the C function takes rows of even length."""
    shape, dtype, device = out_OI.shape, out_OI.dtype, out_OI.device.type
    native = _native(f"nf4_{_SUFFIX[dtype]}") if device == "cpu" and shape[-1] % 2 == 0 else None
    if native is not None:
        pointers = (c_void_p(tensor.data_ptr()) for tensor in (packed_N, maxima_Q, out_OI))
        native(*pointers, c_longlong(BLOCKSIZE), c_longlong(shape[0]), c_longlong(shape[1]))
    elif device == "cuda":
        torch.ops.bitsandbytes.dequantize_4bit.out(packed_N, maxima_Q, BLOCKSIZE, "nf4", shape, dtype, out=out_OI)
    else:
        operation = torch.ops.bitsandbytes.dequantize_4bit.default
        out_OI.copy_(operation(packed_N, maxima_Q, BLOCKSIZE, "nf4", shape, dtype))


class Nf4Stack(torch.Tensor):
    """A frozen expert stack that looks like `[E, O, I]` in `dtype` and holds 4.13 bits a value.

    `expert(e)` gives one dequantised matrix `[O, I]`. Any other operation falls back to the dense stack, so that code
    which only reads shape, dtype or values keeps working; in-place operations are refused. Experts are quantised one
    by one: a block never straddles two experts, and bitsandbytes, which counts elements in int32, never sees a stack.
    """

    packed_EN: torch.Tensor  # uint8 [E, ceil(O*I/2)]
    absmax_EQ: torch.Tensor  # uint8 [E, Q], quantised block maxima
    nested_absmax_ES: torch.Tensor  # float32 [E, ceil(Q/256)]
    offset_E: torch.Tensor  # float32 [E], mean of the block maxima

    @staticmethod
    def __new__(cls, inner: tuple[torch.Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> "Nf4Stack":
        stack: Nf4Stack = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=inner[0].device, requires_grad=False
        )
        return stack

    def __init__(self, inner: tuple[torch.Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> None:
        self.packed_EN, self.absmax_EQ, self.nested_absmax_ES, self.offset_E = inner

    @classmethod
    def quantize(cls, weight_EOI: torch.Tensor) -> "Nf4Stack":
        """Quantise a dense stack expert by expert; the result's dtype is the stack's own."""
        columns: tuple[list[torch.Tensor], ...] = ([], [], [], [])
        for weight_OI in weight_EOI:
            writable = weight_OI if weight_OI.dtype in _SUFFIX else weight_OI.float()
            packed, state = quantize_4bit(
                writable.contiguous(), blocksize=BLOCKSIZE, compress_statistics=True, quant_type="nf4"
            )
            parts = (packed.reshape(-1), state.absmax, state.state2.absmax, state.offset)
            for column, part in zip(columns, parts, strict=True):
                column.append(part)
        inner = tuple(torch.stack(column) for column in columns)
        return cls(inner, weight_EOI.shape, weight_EOI.dtype)

    @property
    def stored(self) -> tuple[torch.Tensor, ...]:
        """The stored tensors, in constructor order."""
        return (self.packed_EN, self.absmax_EQ, self.nested_absmax_ES, self.offset_E)

    @property
    def stored_bytes(self) -> int:
        """Bytes held, quantisation constants included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.stored)

    def maxima(self, experts: slice) -> torch.Tensor:
        """The block maxima of some experts, float32 `[n, Q]`: what `expert` needs, made at once for several."""
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

    def dequantize(self) -> torch.Tensor:
        """The dense stack `[E, O, I]`."""
        dense_EOI = torch.empty(self.shape, dtype=self.dtype, device=self.packed_EN.device)
        for index, dense_OI in enumerate(dense_EOI):
            self.expert(index, dense_OI)
        return dense_EOI

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Nf4Stack(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.Size, torch.dtype]]:
        return ["packed_EN", "absmax_EQ", "nested_absmax_ES", "offset_E"], (self.shape, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, torch.Tensor], meta: tuple[torch.Size, torch.dtype], *_: Any
    ) -> "Nf4Stack":
        return Nf4Stack(tuple(inner.values()), *meta)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _STRUCTURAL:
            return _STRUCTURAL[func](*args, **kwargs)
        if func._schema.is_mutable:
            raise WeightsError(
                Problem(
                    "4-bit expert stack",
                    "a stack cannot be written to in place",
                    "merge adapters with `finetune merge`, which writes full weights",
                    got=str(func),
                )
            )
        dense_args, dense_kwargs = pytree.tree_map_only(Nf4Stack, Nf4Stack.dequantize, (args, kwargs))
        return func(*dense_args, **dense_kwargs)


def _same(stack: Nf4Stack, **_: Any) -> Nf4Stack:
    return Nf4Stack(stack.stored, stack.shape, stack.dtype)


def _to_copy(
    stack: Nf4Stack, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **_: Any
) -> Nf4Stack:
    """Move to a device, or change the dtype that `expert` produces; the stored bits stay as they are."""
    return Nf4Stack(tuple(tensor.to(device) for tensor in stack.stored), stack.shape, dtype or stack.dtype)


_STRUCTURAL: dict[Any, Callable[..., Nf4Stack]] = {
    torch.ops.aten.detach.default: _same,
    torch.ops.aten.alias.default: _same,
    torch.ops.aten._to_copy.default: _to_copy,
}


class _QuantizeStack(ConversionOps):  # type: ignore[misc]
    """Loader operation: turns one stack into an `Nf4Stack` as soon as its experts have been read."""

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, torch.nn.Parameter]:
        return {
            name: torch.nn.Parameter(
                Nf4Stack.quantize(value[0] if isinstance(value, list) else value), requires_grad=False
            )
            for name, value in input_dict.items()
        }


class _QuantizeByKind(ConversionOps):  # type: ignore[misc]
    """Sends expert stacks to `_QuantizeStack` and linear weights to bitsandbytes' own operation."""

    def __init__(self, linear_op: Any) -> None:
        self.linear_op = linear_op
        self.stack_op = _QuantizeStack()

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> Any:
        name = next(iter(input_dict))
        is_stack = is_expert_stack(kwargs["model"], name)
        return (self.stack_op if is_stack else self.linear_op).convert(input_dict, **kwargs)


def is_expert_stack(model: torch.nn.Module, name: str) -> bool:
    """Whether parameter `name` of `model` is a stack `[E, O, I]` of a module that dispatches experts."""
    module, parameter_name = get_module_from_name(model, name)
    parameter = getattr(module, parameter_name, None)
    return hasattr(module, "is_transposed") and parameter is not None and parameter.ndim == 3


@register_quantization_config(QUANT_METHOD)
class MoeNf4Config(BitsAndBytesConfig):  # type: ignore[misc]
    """bitsandbytes NF4 with double quantisation for linear layers *and* expert stacks."""

    def __init__(self, compute_dtype: torch.dtype = torch.float32, **_: Any) -> None:
        super().__init__(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
        self.quant_method = QUANT_METHOD


@register_quantizer(QUANT_METHOD)
class MoeNf4Quantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """transformers' bitsandbytes quantiser, extended to expert stacks."""

    def param_needs_quantization(self, model: torch.nn.Module, param_name: str, **kwargs: Any) -> bool:
        linear: bool = super().param_needs_quantization(model, param_name, **kwargs)
        return linear or is_expert_stack(model, param_name)

    def get_quantize_ops(self) -> _QuantizeByKind:
        return _QuantizeByKind(super().get_quantize_ops())

    def _process_model_after_weight_loading(self, model: torch.nn.Module, **kwargs: Any) -> torch.nn.Module:
        """Keep linear layers in their training layout on CPUs with AVX512-BF16.

        There bitsandbytes 0.50 repacks a `Linear4bit` at its first forward in eval mode, for good: all later forwards
        round to bfloat16 and have no gradient with respect to their input, without an error.
        """
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = False
        loaded: torch.nn.Module = super()._process_model_after_weight_loading(model, **kwargs)
        return loaded

    def is_serializable(self) -> bool:
        """Full 4-bit checkpoints are not written; the adapter is what a run saves."""
        return False
