"""4-bit loading straight to a CUDA device: experts are moved and quantised there one by one."""

from pathlib import Path

import torch

from benchmarks.loading import LAYERS, SMALL, save_checkpoint, stack_bytes
from finetune.moe.nf4 import Nf4Stack
from finetune.recipe import ModelSettings
from tests.bases import load_folder


def test_the_peak_is_what_stays_and_less_than_one_layers_stacks(tmp_path: Path) -> None:
    bf16_bytes = save_checkpoint(SMALL, LAYERS, tmp_path)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load_folder(tmp_path, ModelSettings(name_or_path=str(tmp_path), load_in_4bit=True, dtype="bfloat16"))
    stored, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    stacks = [parameter.data for parameter in model.parameters() if isinstance(parameter.data, Nf4Stack)]
    assert {stack.packed_EN.device.type for stack in stacks} == {"cuda"}
    assert stored <= 0.27 * bf16_bytes
    assert peak <= stored + stack_bytes(SMALL)
