"""What saving a checkpoint costs the training thread: a copy, beside writing it at once as transformers' trainer does.

    python -m benchmarks.saving

An adapter of 32 million parameters with AdamW's state: 384 MB. Medians of 7 interleaved repetitions; each file is on
the disk before the clock stops (fsync), for both.
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from finetune.checkpoint import sync_files, write_sums
from finetune.methods.training_state import snapshot, write_state

PARAMETERS, TENSORS, REPETITIONS = 32_000_000, 64, 7


def made() -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer]:
    """Factors and an optimizer that has taken a step."""
    factors = {f"factor.{number}": torch.randn(PARAMETERS // TENSORS // 100, 100) for number in range(TENSORS)}
    parameters = [torch.nn.Parameter(value) for value in factors.values()]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {name: parameter.detach() for name, parameter in zip(factors, parameters, strict=True)}, optimizer


def seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    """Print the medians and their ratio."""
    factors, optimizer = made()
    state = {"optimizer": optimizer.state_dict(), "factors": factors}
    folder = Path(tempfile.mkdtemp())

    def write_whole() -> None:
        """As our thread does, from the copy."""
        target = folder / "whole"
        target.mkdir()
        save_file(factors, target / "adapter_model.safetensors")
        write_state(target, {"optimizer": optimizer.state_dict()})
        write_sums(target)
        sync_files(target)
        shutil.rmtree(target)

    def write_pickled() -> None:
        """As transformers' trainer does on the training thread, and to the disk."""
        target = folder / "pickled"
        target.mkdir()
        save_file(factors, target / "adapter_model.safetensors")
        torch.save(optimizer.state_dict(), target / "optimizer.pt")
        for file in target.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(target)

    arms: dict[str, Callable[[], Any]] = {
        "copy on the training thread": lambda: snapshot(state),
        "written by the thread, with checksums": write_whole,
        "written at once, pickled": write_pickled,
    }
    try:
        times: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(REPETITIONS):
            for name, action in arms.items():
                times[name].append(seconds(action))
    finally:
        shutil.rmtree(folder)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:40} {median:6.3f} s")
    copy, _, pickled = medians.values()
    print(f"the training waits {copy / pickled:.2f} times as long as where it writes itself")


if __name__ == "__main__":
    main()
