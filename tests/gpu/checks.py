"""What must hold on a CUDA device, as functions of the device: rehearsed on the CPU (`tests/unit/test_gpu_checks.py`).

T tokens, K experts a token, E experts, H hidden, I intermediate, r rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch.nn.functional import linear, silu

from benchmarks import arms
from benchmarks.arms import DENSE, OURS, STACKS, Arm
from benchmarks.decoder import DecoderArm, build_decoder, prepared
from benchmarks.shapes import Routing, Shape, draw_routing
from finetune.methods.router_term import RouterTerm
from finetune.moe import experts
from finetune.moe.engine.gates import SiluGate
from finetune.moe.families import FAMILIES
from finetune.moe.nf4 import Nf4Stack
from finetune.recipe import LoraSettings, RouterSettings
from tests.bases import with_lora
from tests.families import tiny_model

SHAPE = Shape(128, 192, 8, 2, 96, 16)
UNALIGNED = Shape(128, 192, 8, 2, 96, 4)  # rank 4 in bfloat16: 8 bytes, where grouped products want 16
WIDE = Shape(128, 192, 8, 2, 96, 64)  # more factors than are added by one product
WIDTHS = (32, 1000, 1024, 3000)  # of a gate: whole blocks of its kernels and parts of one
RELATIVE = 0.02  # norm of the error over the norm of the value, in bfloat16


def routings() -> dict[str, torch.Tensor]:
    """Choices `[T, K]`: uneven, and such that most experts have no row."""
    return {"skewed": draw_routing(SHAPE).index_TK, "two experts have all": torch.tensor([[5, 2]] * SHAPE.tokens)}


def arm_with(index_TK: torch.Tensor, name: str, device: str, shape: Shape = SHAPE) -> Arm:
    """Our experts in bfloat16 with given choices."""
    weight_TK = torch.rand(index_TK.shape, generator=torch.Generator().manual_seed(3))
    inputs = arms.make_inputs(shape, Routing(index_TK, weight_TK, 0.0), torch.bfloat16, device)
    return arms.build(name, shape, inputs)


def results(arm: Arm) -> dict[str, torch.Tensor]:
    """Output and all gradients of one step."""
    arm.step()
    leaves = {"x": arm.inputs.x_TH, "weights": arm.inputs.weight_TK, **arm.lora}
    gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert len(gradients) == len(leaves)
    return {"output": arm.forward().detach(), **gradients}


def reference(arm: Arm) -> dict[str, torch.Tensor]:
    """The same in float64 on the CPU: one loop over experts, dense `W + s B A`, autograd."""
    experts_module = next(module for module in arm.model.modules() if hasattr(module, "is_transposed"))
    lora = {name: value.detach().double().cpu().requires_grad_() for name, value in arm.lora.items()}
    merged = {}
    for name in STACKS:
        wrapper = experts_module.lora_sources[name]
        path = next(key for key, module in arm.model.named_modules() if module is wrapper)
        A, B = (lora[f"{path}.lora_{letter}.default.weight"] for letter in "AB")
        A_ErI = A.reshape(SHAPE.experts, -1, A.shape[-1])
        B_OrE = B.reshape(B.shape[0], -1, SHAPE.experts)
        data = getattr(experts_module, name).data
        dense = data.dequantize() if isinstance(data, Nf4Stack) else data
        delta = torch.einsum("ore,eri->eoi", B_OrE, A_ErI)
        merged[name] = dense.double().cpu() + wrapper.scaling["default"] * delta
    x = arm.inputs.x_TH.detach().double().cpu().requires_grad_()
    weights = arm.inputs.weight_TK.detach().double().cpu().requires_grad_()
    out = torch.zeros_like(x)
    index = arm.inputs.routing.index_TK.cpu()
    for expert in range(SHAPE.experts):
        token, choice = torch.where(index == expert)
        gate, up = linear(x[token], merged["gate_up_proj"][expert]).chunk(2, -1)
        y = linear(silu(gate) * up, merged["down_proj"][expert])
        out = out.index_add(0, token, y * weights[token, choice, None])
    out.backward(arm.inputs.grad_TH.double().cpu())  # type: ignore[no-untyped-call]
    leaves = {"x": x, "weights": weights, **lora}
    gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"output": out.detach(), **gradients}


def assert_close(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], relative: float = RELATIVE) -> None:
    """Every tensor of `wanted` within `relative` of its norm."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        error = (got[name].double().cpu() - value.double().cpu()).norm()
        assert torch.isfinite(error), name
        assert error <= relative * value.double().norm().cpu() + 1e-12, f"{name}: {error / value.double().norm().cpu()}"


def check_values_and_gradients(device: str, routing: str, quantised: bool, shape: Shape = SHAPE) -> None:
    """bfloat16 on the device against float64 on the CPU."""
    arm = arm_with(routings()[routing], OURS if quantised else DENSE, device, shape)
    assert_close(results(arm), reference(arm))


def check_tokens_without_an_expert(device: str) -> None:
    """Index E means "no expert". Only expert parallelism asks for it, where grouped products are not used."""
    T, E = SHAPE.tokens, SHAPE.experts
    arm = arm_with(torch.tensor([[0, E]] * (T // 2) + [[E, E]] * (T // 2)), OURS, device)
    with grouped_products(False):
        assert_close(results(arm), reference(arm))


@contextmanager
def grouped_products(used: bool) -> Iterator[None]:
    """Take one of the two ways to compute, whatever the device has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "_grouped_products", lambda x: used)
        yield


def check_grouped_is_loop(device: str, routing: str, shape: Shape = SHAPE) -> None:
    """Grouped products of all experts and the loop over experts compute the same."""
    arm = arm_with(routings()[routing], OURS, device, shape)
    with grouped_products(False):
        loop = {name: value.clone() for name, value in results(arm).items()}
    with grouped_products(True):
        assert_close(results(arm), loop, relative=RELATIVE / 2)


def check_family(device: str, model_type: str) -> None:
    """One layer's experts of an architecture, in 4 bits with LoRA: whatever gate, bias and layout they have."""
    model = tiny_model(model_type).to(device, torch.bfloat16)
    dispatching = [module for module in model.modules() if hasattr(module, "is_transposed")]
    for each in dispatching:
        for name, stack in list(each.named_parameters(recurse=False)):
            if stack.ndim == 3:
                setattr(each, name, torch.nn.Parameter(Nf4Stack.quantize(stack.data), requires_grad=False))
    model = with_lora(model, LoraSettings(targets=["experts"], r=4, lora_alpha=8.0))
    module: Any = dispatching[0]
    generator = torch.Generator().manual_seed(4)
    x_TH = torch.randn(40, model.config.hidden_size, generator=generator).to(device, torch.bfloat16).requires_grad_()
    weight_TK = torch.rand(40, 2, generator=generator).to(device).requires_grad_()
    index_TK = torch.rand(40, module.num_experts, generator=generator).topk(2).indices.to(device)
    factors = {
        f"{name}.{letter}": getattr(source, f"lora_{letter}").default.weight
        for name, source in module.lora_sources.items()
        for letter in "AB"
    }
    for factor in factors.values():
        torch.nn.init.normal_(factor, std=0.1)
    leaves = {"x": x_TH, "weights": weight_TK, **factors}

    def step(grouped: bool) -> dict[str, torch.Tensor]:
        with grouped_products(grouped):
            output = experts.experts_forward(module, x_TH, index_TK, weight_TK)
            gradients = torch.autograd.grad(output.float().square().sum(), list(leaves.values()))
        return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}

    assert_close(step(True), step(False), relative=RELATIVE)


def check_gate(device: str, width: int) -> None:
    """The gate of most architectures, forward and backward, against autograd in float64 on the CPU."""
    generator = torch.Generator().manual_seed(5)
    u_nO, dh_nI = (torch.randn(7, size, generator=generator).to(torch.bfloat16) for size in (2 * width, width))
    weight_n = torch.rand(7, generator=generator)
    gate = SiluGate()
    there = [tensor.to(device, copy=True) for tensor in (u_nO, dh_nI, weight_n)]  # one is overwritten
    got = {"forward": gate.forward(there[0])}
    got["h"], got["products"], backward = gate.again(*there)
    got["du"] = backward()

    leaf_nO = u_nO.double().requires_grad_()
    first_nI, second_nI = leaf_nO.chunk(2, -1)
    h_nI = silu(first_nI) * second_nI
    (du_nO,) = torch.autograd.grad(h_nI, leaf_nO, dh_nI.double() * weight_n[:, None])
    h_nI = h_nI.detach()
    products_n = (dh_nI.double() * h_nI).sum(-1)
    assert_close(got, {"forward": h_nI, "h": h_nI, "products": products_n, "du": du_nO}, relative=RELATIVE / 2)


def check_quantisation(device: str) -> None:
    """A stack quantised on the device is the one quantised on the CPU, and moved there stands for the same values.

    Values half-way between two of the 16 levels may fall either way, block maxima of 8 bits likewise.
    """
    weight_EOI = torch.randn(4, 96, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    on_cpu, there = Nf4Stack.quantize(weight_EOI), Nf4Stack.quantize(weight_EOI.to(device))
    assert there.packed_EN.device.type == torch.device(device).type
    assert (on_cpu.packed_EN == there.packed_EN.cpu()).float().mean() > 0.99
    moved: Any = on_cpu.to(device)
    assert isinstance(moved, Nf4Stack)
    torch.testing.assert_close(moved.dequantize().cpu(), on_cpu.dequantize(), atol=0, rtol=2**-7)
    error = (there.dequantize().cpu().float() - weight_EOI.float()).norm() / weight_EOI.float().norm()
    assert error < 0.12  # NF4 of normal values: 9 to 10 %


def check_linear_layers(device: str) -> None:
    """bitsandbytes' linear layers of a random model hold what they were made from."""
    arm = build_decoder(OURS, SHAPE, layers=1, device=device)
    linears = [module for module in arm.model.modules() if isinstance(module, Linear4bit)]
    assert len(linears) == 4
    for module in linears:
        weight: Any = module.weight
        dense = dequantize_4bit(weight.data, weight.quant_state)
        assert dense.shape == (module.out_features, module.in_features)
        assert 0.015 < dense.float().std() < 0.025


def check_recomputation(device: str) -> None:
    """None, selective and full recomputation give the same gradients."""
    arm = build_decoder(OURS, SHAPE, layers=2, device=device)
    found = [decoder_gradients(arm, mode) for mode in ("none", "selective", "full")]
    assert_close(found[1], found[0], relative=RELATIVE / 4)
    assert_close(found[2], found[0], relative=RELATIVE / 4)


def decoder_gradients(arm: DecoderArm, mode: Any) -> dict[str, torch.Tensor]:
    """Gradients of one step of decoder layers."""
    with prepared({OURS: arm}, tokens=96, sequence=48, mode=mode):
        arm.step()
        trained = [(name, value.grad) for name, value in arm.model.named_parameters() if value.requires_grad]
        return {name: grad.clone() for name, grad in trained if grad is not None}


def check_router_step(device: str) -> Callable[[], None]:
    """A step of the routers' terms, statistics and biases as a function, which must not wait for the device."""
    family = FAMILIES["deepseek_v3"]
    model = with_lora(tiny_model("deepseek_v3").to(device), LoraSettings(targets=["router"], r=4, lora_alpha=8.0))
    settings = RouterSettings(router_aux_loss_coef=0.1, router_z_loss_coef=0.01, bias_update_rate=0.001)
    term = RouterTerm(model, family, settings)
    hidden_TH = torch.randn(40, model.config.hidden_size, device=device)
    real_T = torch.ones(40, device=device)

    def step() -> None:
        term.begin_step(real_T.sum(), logged=True)
        with term.capture() as record:
            for router in term.routers:
                router.called(hidden_TH)
        torch.autograd.backward(term.add(hidden_TH.sum(), record, real_T, ranks=1))
        term.end_step(lambda x: x)

    step()
    before = [bias.clone() for bias in term.bias.biases.values()] if term.bias is not None else []
    step()
    assert term.bias is not None
    assert all(not torch.equal(old, bias) for old, bias in zip(before, term.bias.biases.values(), strict=True))
    assert term.figures()[0]["router/max_load"] >= 1
    return step
