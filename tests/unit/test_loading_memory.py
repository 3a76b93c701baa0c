"""What 4-bit loading holds in memory: while it loads, and for good."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.loading import measure_loading
from finetune.moe.nf4 import Nf4Stack
from finetune.recipe import ModelSettings
from tests.bases import load_folder
from tests.families import save_tiny


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_peak_while_loading_is_what_stays_and_less_than_one_layers_stacks() -> None:
    """Three layers of eight experts, 139 MB in bf16; `make bench` tells the same figures."""
    loading = measure_loading()
    assert loading.layer_stacks == 8 * 3 * 512 * 1792 * 2  # 44 MB
    assert loading.stored <= 0.27 * loading.bf16
    assert loading.peak <= loading.stored + loading.layer_stacks
    assert all(bar.holds() for bar in loading.bars)


class _Largest(TorchDispatchMode):
    """Most values of one tensor given to an operation of bitsandbytes, and of one floating tensor newly made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given = self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = (_real_tensors(tree) for tree in ((args, kwargs), result))
        if func.namespace == "bitsandbytes":
            self.given = max([self.given, *(tensor.numel() for tensor in given)])
        held = {tensor.untyped_storage().data_ptr() for tensor in given}
        new = [tensor for tensor in made if tensor.untyped_storage().data_ptr() not in held]
        self.made = max([self.made, *(tensor.numel() for tensor in new if tensor.is_floating_point())])
        return result


def _real_tensors(tree: Any) -> list[torch.Tensor]:
    leaves = tree_leaves(tree)
    return [
        leaf
        for leaf in leaves
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Nf4Stack) and not leaf.is_meta
    ]


@pytest.mark.parametrize("model_type", ["mixtral", "granitemoe", "gpt_oss"])
def test_no_operation_sees_more_than_one_expert(tmp_path: Path, model_type: str) -> None:
    """One tensor an expert, fused, fused and transposed. bitsandbytes counts in int32: 2^31 values would kill it."""
    folder = save_tiny(model_type, tmp_path, "bfloat16", intermediate_size=256)
    settings = ModelSettings(name_or_path=str(folder), load_in_4bit=True, dtype="bfloat16", attn_implementation="eager")
    with _Largest() as seen:
        load_folder(folder, settings)
    one_expert = 2 * 256 * 64
    assert 0 < seen.given <= one_expert
    assert 0 < seen.made <= one_expert
