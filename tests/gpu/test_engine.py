"""The engine on a CUDA device: bfloat16, grouped products where the device has them, 4-bit stacks."""

import pytest
import torch

from benchmarks.arms import OURS
from benchmarks.gpu_sections import host_syncs
from finetune.moe.dropout import LoraDropout, TokenKeys
from tests.gpu import checks


@pytest.mark.parametrize("quantised", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("routing", checks.routings())
def test_values_and_gradients_are_those_of_float64(routing: str, quantised: bool) -> None:
    checks.check_values_and_gradients("cuda", routing, quantised)


@pytest.mark.parametrize("width", checks.WIDTHS)
def test_the_gates_kernels(width: int) -> None:
    checks.check_gate("cuda", width)


def test_factors_too_many_for_one_product() -> None:
    checks.check_values_and_gradients("cuda", "skewed", quantised=True, shape=checks.WIDE)


def test_a_rank_that_grouped_products_refuse_is_padded() -> None:
    checks.check_values_and_gradients("cuda", "skewed", quantised=True, shape=checks.UNALIGNED)


def test_tokens_without_an_expert() -> None:
    checks.check_tokens_without_an_expert("cuda")


@pytest.mark.parametrize("routing", checks.routings())
def test_grouped_products_compute_what_the_loop_computes(routing: str) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("grouped products are for Hopper and later")
    checks.check_grouped_is_loop("cuda", routing)


def test_a_step_never_waits_for_the_device_on_hopper_and_once_elsewhere() -> None:
    arm = checks.arm_with(checks.routings()["skewed"], OURS, "cuda")
    syncs = host_syncs(arm.step, "cuda")
    assert syncs is not None
    assert syncs <= (0 if torch.cuda.get_device_capability() >= (9, 0) else 1)


def test_syncs_are_counted_forward_and_backward() -> None:
    """Otherwise zero would say nothing."""
    x = torch.ones(3, device="cuda", requires_grad=True)

    def step() -> None:
        y = x.clone()
        y.register_hook(lambda gradient: gradient * gradient.sum().item())  # type: ignore[no-untyped-call]
        (y * y.sum().item()).sum().backward()  # type: ignore[no-untyped-call]

    assert host_syncs(step, "cuda") == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_what_it_drops_on_the_cpu(dtype: torch.dtype) -> None:
    masks = []
    for device in ("cpu", "cuda"):
        token_keys = TokenKeys()
        token_keys.begin(seed=42, step=7, places=torch.arange(3000, device=device))
        masks.append(LoraDropout(0.1, "a", token_keys)(torch.ones(3000, 1001, dtype=dtype, device=device)).cpu())
    assert torch.equal(*masks)


def test_quantised_on_the_device_as_on_the_cpu() -> None:
    checks.check_quantisation("cuda")


def test_random_linear_layers_hold_their_values() -> None:
    checks.check_linear_layers("cuda")


def test_recomputation_changes_no_gradient() -> None:
    checks.check_recomputation("cuda")


def test_routers_never_make_the_host_wait() -> None:
    """Balance term, z-loss, statistics, the comparison with the base router, and moving the correction biases."""
    assert host_syncs(checks.check_router_step("cuda"), "cuda") == 0
