"""The machine that the GPU tests run on."""

import bitsandbytes.functional as bnb
import torch


def test_nf4_survives_the_device() -> None:
    """bitsandbytes' CUDA kernels load and agree with its CPU code on one matrix."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    on_cpu = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4"))
    on_gpu = bnb.dequantize_4bit(*bnb.quantize_4bit(weight.cuda(), quant_type="nf4")).cpu()
    # Values half-way between two of the 16 levels may fall either way.
    assert (on_cpu == on_gpu).float().mean() > 0.99
