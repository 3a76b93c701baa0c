"""The checks of `tests/gpu`, rehearsed on the CPU: they must run at first try where a GPU is lent by the minute."""

import pytest

from benchmarks.shapes import Shape
from tests.families import CONFIGS
from tests.gpu import checks


@pytest.mark.parametrize("quantised", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("routing", checks.routings())
def test_values_and_gradients_in_bfloat16(routing: str, quantised: bool) -> None:
    checks.check_values_and_gradients("cpu", routing, quantised)


@pytest.mark.parametrize("routing", checks.routings())
@pytest.mark.parametrize("shape", [checks.SHAPE, checks.UNALIGNED, checks.WIDE], ids=["rank 16", "rank 4", "rank 64"])
def test_grouped_products_compute_what_the_loop_computes(routing: str, shape: Shape) -> None:
    checks.check_grouped_is_loop("cpu", routing, shape)


def test_tokens_without_an_expert() -> None:
    checks.check_tokens_without_an_expert("cpu")


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_experts_of_every_architecture(model_type: str) -> None:
    checks.check_family("cpu", model_type)


@pytest.mark.parametrize("width", checks.WIDTHS)
def test_the_gate(width: int) -> None:
    checks.check_gate("cpu", width)


def test_quantisation() -> None:
    checks.check_quantisation("cpu")


def test_linear_layers() -> None:
    checks.check_linear_layers("cpu")


def test_recomputation_changes_no_gradient() -> None:
    checks.check_recomputation("cpu")


def test_a_step_of_the_routers_terms() -> None:
    checks.check_router_step("cpu")
