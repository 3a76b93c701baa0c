"""Dropout on the input of an adapter, with masks that are a function of what they belong to, not of draws in turn.

Whether an element is kept depends on the recipe's seed, the optimizer step, the row of the data set, the token's place
in that row, the module (of experts also the expert) and the feature. A step cut into other micro-batches, or divided
among other processes, drops the same elements, as does a recompute, and the backward makes the masks again.

The trainer gives each token of a micro-batch a 64-bit key (`TokenKeys`). With the number of the module it becomes an
odd 32-bit factor; two neighbouring features share another one. The halves of the product's hash decide about the two
features, so probabilities are multiples of 2**-16. Integers wrap around in the same way on every device.

T tokens, n rows, E experts, I features, W = ceil(I / 2) words of two features.
"""

from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import Any

import torch

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / the golden ratio, as in splitmix64
_LEVELS = 2**16
_WORDS_AT_ONCE = {"cpu": 2**17}  # on a CPU they stay in its cache
_MANY_WORDS = 2**25


def _signed(value: int, bits: int = 64) -> int:
    """The number with the same bits as a signed integer."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _mix(z: torch.Tensor) -> torch.Tensor:
    """The finalizer of splitmix64 on int64: every bit of the result depends on every bit of `z`."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ ((z >> shift) & ((1 << 64 - shift) - 1))) * _signed(factor)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def _odd_factors(z: torch.Tensor) -> torch.Tensor:
    return (_mix(z) >> 32).to(torch.int32) | 1


@cache
def _feature_factors(words: int, device: torch.device) -> torch.Tensor:
    return _odd_factors(torch.arange(words, device=device) * _signed(_GOLDEN))


class TokenKeys:
    """The keys of the tokens of one micro-batch, for all dropout modules of a model; they stay until the next one."""

    def __init__(self) -> None:
        self._keys_T: torch.Tensor | None = None

    def begin(self, seed: int, step: int, places: torch.Tensor) -> None:
        """`places`: int64, one for each token of the micro-batch, that no other token of the optimizer step has."""
        step_key = int(_mix(_mix(torch.tensor(seed)) + step))
        self._keys_T = _mix(_mix(places.reshape(-1)) + step_key)

    def present(self) -> torch.Tensor:
        """int64 `[T]`."""
        if self._keys_T is None:
            raise RuntimeError("lora_dropout: a forward in training mode needs TokenKeys.begin with the micro-batch")
        return self._keys_T


@dataclass(frozen=True)
class InputDropout:
    """Dropout of one module's input in the present micro-batch; `experts`: E, of a stack of experts."""

    probability: float
    module: int  # 64 bits that no other module has
    keys_T: torch.Tensor
    experts: int = 0

    @property
    def _dropped_levels(self) -> int:
        return min(max(round(self.probability * _LEVELS), 1), _LEVELS - 1)

    @property
    def scale(self) -> float:
        """What kept elements are multiplied by: 1 / (1 - p)."""
        return _LEVELS / (_LEVELS - self._dropped_levels)

    def expert_keys(self) -> torch.Tensor:
        """What is added to the key of a token for each expert, int64 `[E, 1]`."""
        return torch.arange(self.experts, device=self.keys_T.device)[:, None] * _signed(_GOLDEN)

    def mask(self, like_nI: torch.Tensor, keys_n: torch.Tensor) -> torch.Tensor:
        """0 or `scale` for each element, in the dtype of `like_nI`; `keys_n`: of the tokens in its rows."""
        mask_nI = torch.empty_like(like_nI, memory_format=torch.contiguous_format)
        rows, features = mask_nI.shape
        factor_n = _odd_factors(keys_n + self.module)
        factor_W = _feature_factors(-(-features // 2), like_nI.device)
        at_once = max(_WORDS_AT_ONCE.get(like_nI.device.type, _MANY_WORDS) // max(len(factor_W), 1), 1)
        for start in range(0, rows, at_once):
            word_nW = factor_n[start : start + at_once, None] * factor_W
            word_nW ^= word_nW >> 16
            word_nW *= _signed(_GOLDEN >> 32, 32) | 1
            half_nI = word_nW.view(torch.int16)[:, :features]
            torch.ge(half_nI, self._dropped_levels - _LEVELS // 2, out=mask_nI[start : start + at_once])
        return mask_nI.mul_(self.scale)


class LoraDropout(torch.nn.Module):
    """In PEFT's LoRA layers in place of `torch.nn.Dropout`; without parameters or buffers."""

    def __init__(self, probability: float, name: str, token_keys: TokenKeys) -> None:
        """`name`: of the adapter's place in the model, its own."""
        super().__init__()
        self.p, self.name, self.token_keys = probability, name, token_keys
        self._module = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)

    def extra_repr(self) -> str:
        """As `torch.nn.Dropout`."""
        return f"p={self.p}"

    def now(self, experts: int = 0) -> InputDropout | None:
        """With the keys of the present micro-batch; None outside of training."""
        return InputDropout(self.p, self._module, self.token_keys.present(), experts) if self.training else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [..., I]` of all tokens in their order, some elements 0 and the others scaled."""
        dropout = self.now()
        if dropout is None:
            return x
        if x.numel() != len(dropout.keys_T) * x.shape[-1]:
            shape = list(x.shape)
            raise RuntimeError(f"lora_dropout: {self.name} got {shape} for {len(dropout.keys_T)} tokens with a key")
        dropped: torch.Tensor = _Dropped.apply(x, dropout)  # type: ignore[no-untyped-call]
        return dropped


class _Dropped(torch.autograd.Function):
    """`x` times its mask, which is not kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dropout: InputDropout) -> torch.Tensor:
        ctx.dropout = dropout
        return _masked(x, dropout)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _masked(grad_outputs[0], ctx.dropout), None


def _masked(x: torch.Tensor, dropout: InputDropout) -> torch.Tensor:
    x_TI = x.reshape(-1, x.shape[-1])
    return dropout.mask(x_TI, dropout.keys_T).mul_(x_TI).view(x.shape)


def token_keys_of(model: torch.nn.Module) -> TokenKeys | None:
    """What the dropout modules of an adapted model share; None without dropout."""
    modules = (module for module in model.modules() if isinstance(module, LoraDropout))
    first = next(modules, None)
    return None if first is None else first.token_keys
