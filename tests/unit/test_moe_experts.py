"""The factored expert forward and backward against a plain double-precision reference."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import linear, silu

from benchmarks.memory import transient_bytes
from finetune.moe.engine.routed_rows import ExpertFactors
from finetune.moe.experts import experts_forward
from finetune.moe.nf4 import Nf4Stack

T, H, INTERMEDIATE, RANK, SCALE = 12, 64, 96, 3, 2.0


def experts_module(num_experts: int, quantised: bool) -> Any:
    """A module as transformers builds it, with LoRA sources as the adapter leaves them."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"gate_up_proj": (2 * INTERMEDIATE, H), "down_proj": (H, INTERMEDIATE)}
    module = SimpleNamespace(num_experts=num_experts, lora_sources={}, has_gate=True, has_bias=False)
    module.is_transposed = module._is_expert_parallel = False
    module._apply_gate = lambda gate_up: silu(gate_up.chunk(2, -1)[0]) * gate_up.chunk(2, -1)[1]
    for name, (out, inp) in shapes.items():
        weight = torch.randn(num_experts, out, inp, generator=generator) * 0.1
        data = Nf4Stack.quantize(weight) if quantised else weight
        setattr(module, name, torch.nn.Parameter(data, requires_grad=False))
        A = (torch.randn(num_experts, RANK, inp, generator=generator) * 0.1).requires_grad_()
        B = (torch.randn(num_experts, out, RANK, generator=generator) * 0.1).requires_grad_()
        factors = ExpertFactors(A, B.transpose(1, 2), SCALE)
        module.lora_sources[name] = SimpleNamespace(active_factors=lambda factors=factors: [factors], leaves=(A, B))
    return module


def reference(module: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One loop over tokens and choices, dense `W + s B A`, fp64."""

    def merged(name: str, expert: int) -> torch.Tensor:
        data = getattr(module, name).data
        dense = data.expert(expert) if isinstance(data, Nf4Stack) else data[expert]
        A, B = module.lora_sources[name].leaves
        weight: torch.Tensor = dense.double() + SCALE * B[expert].double() @ A[expert].double()
        return weight

    rows = []
    for token in range(x.shape[0]):
        row = torch.zeros(H, dtype=torch.float64)
        for choice, weight in zip(index[token].tolist(), weights[token], strict=True):
            if choice < module.num_experts:
                hidden = module._apply_gate(linear(x[token].double(), merged("gate_up_proj", choice)))
                row = row + weight.double() * linear(hidden, merged("down_proj", choice))
        rows.append(row)
    return torch.stack(rows)


ROUTINGS = {
    "spread": lambda E: torch.stack([torch.randperm(E)[:2] for _ in range(T)]),
    "two experts have all": lambda E: torch.tensor([[0, 1]] * T),
    "some tokens have no expert": lambda E: torch.tensor([[0, E]] * (T // 2) + [[E, E]] * (T // 2)),
    "no token has an expert": lambda E: torch.full((T, 2), E),
}


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_values_and_gradients_are_those_of_the_plain_reference(routing: str, quantised: bool) -> None:
    torch.manual_seed(0)
    module = experts_module(num_experts=4, quantised=quantised)
    index = ROUTINGS[routing](4)
    x = torch.randn(T, H, requires_grad=True)
    weights = torch.rand(T, 2, requires_grad=True)
    leaves = [x, weights, *(leaf for source in module.lora_sources.values() for leaf in source.leaves)]
    cotangent = torch.randn(T, H)

    ours = experts_forward(module, x, index, weights)
    wanted = reference(module, x, index, weights)
    torch.testing.assert_close(ours.double(), wanted, atol=1e-5, rtol=1e-5)

    if not wanted.requires_grad:
        return
    got = torch.autograd.grad((ours * cotangent).sum(), leaves, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad((wanted * cotangent).sum(), leaves, allow_unused=True, materialize_grads=True)
    for ours_gradient, expected_gradient in zip(got, expected, strict=True):
        torch.testing.assert_close(ours_gradient, expected_gradient, atol=1e-5, rtol=1e-4)


def test_no_dequantised_weight_is_saved_for_the_backward() -> None:
    module = experts_module(num_experts=4, quantised=True)
    index, weights = ROUTINGS["spread"](4), torch.rand(T, 2)
    saved: list[tuple[int, ...]] = []

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        experts_forward(module, torch.randn(T, H, requires_grad=True), index, weights)
    weights_shapes = {(2 * INTERMEDIATE, H), (H, 2 * INTERMEDIATE), (H, INTERMEDIATE), (INTERMEDIATE, H)}
    assert saved
    assert not weights_shapes & set(saved)


@pytest.mark.parametrize("frozen", [0, 1], ids=["A", "B"])
def test_the_gradient_of_one_factor_does_not_depend_on_whether_the_other_trains(frozen: int) -> None:
    module, index = experts_module(num_experts=4, quantised=True), ROUTINGS["spread"](4)
    x, weights = torch.randn(T, H), torch.rand(T, 2)

    def gradients() -> list[torch.Tensor]:
        trained = [source.leaves[1 - frozen] for source in module.lora_sources.values()]
        return list(torch.autograd.grad(experts_forward(module, x, index, weights).square().sum(), trained))

    both = gradients()
    for source in module.lora_sources.values():
        source.leaves[frozen].requires_grad_(False)
    for alone, wanted in zip(gradients(), both, strict=True):
        assert torch.equal(alone, wanted)
        assert wanted.abs().max() > 0


def test_second_derivatives_are_refused() -> None:
    module, x = experts_module(num_experts=4, quantised=True), torch.randn(T, H, requires_grad=True)
    output = experts_forward(module, x, ROUTINGS["spread"](4), torch.rand(T, 2))
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()  # type: ignore[no-untyped-call]


def test_a_forward_without_a_gradient_keeps_nothing_for_a_backward() -> None:
    """`u [R, 2I]` of all rows is the largest thing that training keeps; here there is one of a chunk at a time."""
    module, index = experts_module(num_experts=16, quantised=False), torch.arange(16).repeat(256, 1)
    x, weights = torch.randn(256, H), torch.rand(256, 16)
    wanted = experts_forward(module, x, index, weights)

    def forward() -> None:
        with torch.no_grad():
            assert torch.equal(experts_forward(module, x, index, weights), wanted)

    assert transient_bytes(forward) < index.numel() * 2 * INTERMEDIATE * 4
