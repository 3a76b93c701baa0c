"""TRL's fused head, with tiles that fit the processor it runs on.

`add_fused_lm_head` cuts the logits into tiles of 4,096 tokens and 32,768 entries, and away from Triton scores every
position. On the CPU eight tiles are in memory at once, so that the head needs nearly three times the
memory of a full logits tensor, and takes five times as long (`benchmarks/LOG.md`).

N scored tokens, at most 4,096 at a time.
"""

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch

TILE = 512
"""Entries of the vocabulary in a tile on the CPU: 8 MB with 4,096 tokens in float32."""


def fit_head_to_cpu(model: Any) -> None:
    """Give a CPU model, to which TRL has added its fused head, tiles `[N, TILE]` of supervised tokens alone.

    The head stays TRL's own function, with its handling of architectures; two of the globals that it reads are
    replaced, for this model only. Raises KeyError where another release of TRL no longer looks them up.
    """
    added: Any = model.forward.__func__
    names = dict(added.__globals__)
    if missing := _ON_CPU.keys() - (names.keys() & set(added.__code__.co_names)):
        raise KeyError(f"TRL's fused head has no {' and no '.join(sorted(missing))} any more; see {__name__}")
    fitted = FunctionType(added.__code__, names | _ON_CPU, added.__name__, added.__defaults__, added.__closure__)
    fitted.__kwdefaults__ = added.__kwdefaults__
    fitted.__dict__.update(added.__dict__)  # `__wrapped__`, where transformers reads the arguments that there are
    model.forward = MethodType(fitted, model)


def _everywhere(_device: torch.device) -> bool:
    """Replaces the check for Triton, which decides whether only supervised positions are scored.

    TRL scores all elsewhere because accelerators that compile for each shape would compile again in every step.
    """
    return True


_ON_CPU: dict[str, int | Callable[[torch.device], bool]] = {
    "_CHUNKED_LOGPROB_CHUNK_SIZE": TILE,
    "_use_triton": _everywhere,
}
