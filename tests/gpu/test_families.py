"""The experts of every architecture on a CUDA device, by grouped products and by the loop."""

import pytest
import torch

from tests.families import CONFIGS
from tests.gpu import checks


@pytest.mark.parametrize("model_type", CONFIGS)
def test_grouped_products_compute_what_the_loop_computes(model_type: str) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("grouped products are for Hopper and later")
    checks.check_family("cuda", model_type)
