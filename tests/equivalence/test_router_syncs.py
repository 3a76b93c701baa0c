"""Reads of the device in a step: the finite check and the logged figures, apart from transformers' attention mask.

On a GPU a host that reads a value waits for all work before it. Here, without one, the reads themselves are counted, by
the function that makes them, whatever package it belongs to.
"""

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import finetune
from tests.equivalence.dpo_runs import dpo_recipe, dpo_trainer, write_pairs
from tests.equivalence.sft_runs import recipe, trainer_for

ROOTS = (Path(finetune.__file__).parents[1], Path(torch.__file__).parents[1])
# Python methods of a tensor that reach no operator on a CPU tensor; all other reads end in one of the operators below.
METHODS = {"tolist", "cpu", "numpy", "__array__"}
OPERATORS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount"}
OPERATORS |= {"_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
MASKS = (torch.bool, torch.uint8)

STEPS, MICRO_BATCHES = 3, 4
ON_HOST = {
    "torch/optim/optimizer.py:_get_value": "the optimizer's count of steps, kept on the host",
    "bitsandbytes/functional.py:create_dynamic_map": "a table made once, on the host",
    "finetune/upstream.py:native_dequantize": "a check at first use, on the host",
    "finetune/data/tokens/collators.py:supervised_positions": "a batch before its transfer to the device",
    "finetune/moe/experts.py:_sort_rows": "the loop over experts, where a device has no kernel for grouped products",
    "transformers/trainer_pt_utils.py:nested_numpify": "the result of an evaluation",
}
FORWARD = {
    "transformers/masking_utils.py:_ignore_causal_mask_sdpa": "is any row padded? at most twice",
    "transformers/masking_utils.py:find_packed_sequence_indices": "does a row hold several documents? once",
}
"""What transformers reads for the attention mask of a forward, once or twice: its models offer no argument that says
whether rows are padded or packed, short of a mask of our own for each kind of layer."""


class Reads:
    """Counts reads of tensor values, by file and function of the caller; a data loader's tensors are on the host."""

    def __init__(self) -> None:
        self.by_function: Counter[str] = Counter()

    def __enter__(self) -> "Reads":
        self._modes = ExitStack()
        for mode in (_Methods(self), _Operators(self)):
            self._modes.enter_context(mode)
        return self

    def __exit__(self, *error: Any) -> None:
        self._modes.__exit__(*error)

    def add(self, frame: FrameType | None) -> None:
        """Count a read below `frame`, for the first caller that is no machinery of torch."""
        caller, path = None, ""
        while frame is not None:
            path = frame.f_code.co_filename
            if path.endswith("accelerate/data_loader.py") or "torch/utils/data" in path:
                return
            machinery = ("_python_dispatch.py", "torch/_compile.py", "eval_frame.py", "torch/_ops.py", __file__)
            if caller is None and "__torch_" not in frame.f_code.co_name and not path.endswith(machinery):
                caller = frame
            frame = frame.f_back
        assert caller is not None
        path = caller.f_code.co_filename
        (name,) = [str(Path(path).relative_to(root)) for root in ROOTS if Path(path).is_relative_to(root)][-1:]
        self.by_function[f"{name}:{caller.f_code.co_name}"] += 1


class _Methods(TorchFunctionMode):
    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # The device of this run is itself the CPU: what goes to the device is no read.
        targets = [argument for argument in (*args[1:], kwargs.get("device")) if isinstance(argument, str)]
        if name in METHODS or (name == "to" and "cpu" in targets):
            self.reads.add(sys._getframe(1))
        return func(*args, **kwargs)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, reads: Reads) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        by_mask = name in INDEXING and any(index is not None and index.dtype in MASKS for index in args[1])
        sized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in OPERATORS or by_mask or sized:
            self.reads.add(sys._getframe(1))
        return func(*args, **kwargs)


def reads_of(trainer: Any) -> dict[str, int]:
    """What a training run reads, apart from what lies on the host and what each forward of the model reads."""
    forwards = 0

    def count_forward(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    hook = trainer.model.register_forward_pre_hook(count_forward)
    with Reads() as reads:
        trainer.train()
    hook.remove()
    in_forwards = {name: count for name, count in reads.by_function.items() if name in FORWARD}
    assert sum(in_forwards.values()) <= 2 * forwards
    return {name: count for name, count in reads.by_function.items() if name not in ON_HOST | FORWARD}


def of_a_run(lines: int) -> dict[str, int]:
    """What every run of `STEPS` steps reads: once a step, and a few values for each logged line."""
    return {
        "finetune/methods/trainer.py:_step_figures": STEPS,  # is every loss and the gradient finite
        "finetune/methods/trainer.py:_over_ranks": lines,
        "finetune/methods/trainer.py:num_tokens": lines,
        "finetune/methods/router_term.py:figures": lines,
        "transformers/trainer.py:_maybe_log_save_evaluate": 2 * lines,  # the loss and the gradient norm of the line
        "transformers/trainer.py:_finalize_training": 1,
    }


ROUTER = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01}


@pytest.mark.parametrize("logging_steps", [3, 1])
@pytest.mark.parametrize("packing", [False, True])
def test_sft_reads_the_device_for_a_logged_line_and_the_finite_check(
    base: Path, rows: Path, tmp_path: Path, packing: bool, logging_steps: int
) -> None:
    """Three steps of four micro-batches, with balance, z-loss and a trained router that is compared with the base's."""
    size = 1 if packing else 2
    shape: dict[str, Any] = {"per_device_train_batch_size": size, "global_batch_size": size * MICRO_BATCHES}
    shape |= {"packing": packing, "max_length": 64, "gradient_checkpointing": "selective"}
    trainer, _ = trainer_for(recipe(base, rows, tmp_path, ROUTER, logging_steps=logging_steps, **shape))
    assert reads_of(trainer) == of_a_run(STEPS // logging_steps)


@pytest.mark.parametrize(
    ("layout", "reference", "logging_steps"),
    [("padded", "precomputed", 3), ("packed", "precomputed", 1), ("shared", "precomputed", 3), ("shared", "live", 1)],
)
def test_dpo_reads_the_device_for_a_logged_line_and_the_finite_check(
    base: Path, tmp_path: Path, layout: str, reference: str, logging_steps: int
) -> None:
    """With a loss over pairs, one over tokens and one that sorts the pairs."""
    method = {"loss_type": ["sigmoid", "sft", "aot_unpaired"], "reference": reference}
    method["prompt_sharing"] = "auto" if layout == "shared" else "off"
    size = 1 if layout == "packed" else 2
    shape: dict[str, Any] = {"per_device_train_batch_size": size, "global_batch_size": size * MICRO_BATCHES}
    shape |= {"data": {"packing": layout == "packed", "max_length": 64, "eval": None}}
    pairs = write_pairs(tmp_path / "pairs.jsonl", 64)
    settings = dpo_recipe(base, pairs, tmp_path / "run", method, router=ROUTER, logging_steps=logging_steps, **shape)
    trainer, _ = dpo_trainer(settings)
    assert trainer.data_collator.layout == layout
    lines = STEPS // logging_steps
    assert reads_of(trainer) == of_a_run(lines) | {"finetune/methods/pairs.py:figures": lines}
