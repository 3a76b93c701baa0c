"""4-bit expert stacks: the same bits as bitsandbytes expert by expert, quantised while the shards stream in."""

import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit
from bitsandbytes.nn import Linear4bit
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.errors import WeightsError
from finetune.moe import nf4
from finetune.moe.nf4 import Nf4Stack, linear_weight
from finetune.moe.nf4_loading import MoeNf4Config
from tests.support import save_tiny_mixtral
from tests.unit.engine import IDS, base_model, dense_twin, logits, trained_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("shape", [(4, 192, 64), (3, 5, 10), (2, 96, 200)])
def test_each_expert_is_what_bitsandbytes_makes_of_it_alone(shape: tuple[int, int, int]) -> None:
    weight = torch.randn(shape)
    stack = Nf4Stack.quantize(weight)
    for index, expert in enumerate(weight):
        packed, state = quantize_4bit(expert, compress_statistics=True, quant_type="nf4", blocksize=64)
        assert torch.equal(stack.expert(index), dequantize_4bit(packed, state))


def by_hand(weight: torch.Tensor) -> torch.Tensor:
    """A matrix through NF4 by the definition: each value the nearest of 16 times the maximum of its block of 64."""
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4", blocksize=64)
    maxima = dequantize_blockwise(state.absmax, state.state2) + state.offset
    numbers = torch.stack([packed >> 4, packed & 15], dim=-1).reshape(-1)[: weight.numel()].long()
    dense: torch.Tensor = state.code[numbers] * maxima.repeat_interleave(64)[: weight.numel()]
    return dense.reshape(weight.shape)


# bitsandbytes 0.50 gives rows of 16 to 48 or of 96 values the maxima of other blocks on CPUs with AVX512.
WIDTHS = [16, 32, 48, 64, 96, 100, 192]


@pytest.mark.parametrize("width", WIDTHS)
def test_blocks_run_through_a_matrix_whatever_the_length_of_its_rows(width: int) -> None:
    weight = torch.randn(1, 40, width)
    stack = Nf4Stack.quantize(weight)
    assert torch.equal(stack.expert(0), by_hand(weight[0]))
    assert torch.equal(stack.rows(0, 3, 17), by_hand(weight[0])[3:17])


@pytest.mark.parametrize("width", WIDTHS)
def test_a_linear_layer_computes_with_its_own_values(width: int) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=width, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
    )
    model = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        quantised = LlamaForCausalLM.from_pretrained(folder, quantization_config=MoeNf4Config(), dtype=torch.float32)
    layer, weight = quantised.model.layers[0].mlp.down_proj, model.model.layers[0].mlp.down_proj.weight.data
    x = torch.randn(3, width, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(linear_weight(layer.weight), by_hand(weight))
    torch.testing.assert_close(layer(x), x @ by_hand(weight).T)
    torch.testing.assert_close(x.grad, by_hand(weight).sum(dim=0).expand(3, width))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((4, 192, 64), torch.float32),
        ((4, 192, 64), torch.bfloat16),
        ((3, 5, 10), torch.float16),
        ((2, 7, 5), torch.float32),  # rows of odd length take another way through bitsandbytes, slowly
    ],
)
def test_an_expert_is_written_into_memory_that_the_caller_owns(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    stack = Nf4Stack.quantize(torch.randn(shape))
    out = torch.full(shape[1:], torch.nan, dtype=dtype)
    assert stack.expert(1, out) is out
    torch.testing.assert_close(out, stack.expert(1).to(dtype))


def test_float64_stacks_hold_the_values_of_float32() -> None:
    weight = torch.randn(2, 8, 64)
    double = Nf4Stack.quantize(weight.double())
    assert double.expert(0).dtype == torch.float64
    assert torch.equal(double.dequantize(), Nf4Stack.quantize(weight).dequantize().double())


def test_a_matrix_in_several_chunks_has_the_bits_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(2, 67, 64)
    whole = Nf4Stack.quantize(weight)
    monkeypatch.setattr(nf4, "CHUNK", 128)
    for one, several in zip(whole.stored, Nf4Stack.quantize(weight).stored, strict=True):
        assert torch.equal(one, several)


def test_experts_that_are_too_few_too_many_or_uneven_make_no_stack() -> None:
    even, narrow = torch.randn(8, 64), torch.randn(8, 32)
    for experts, complaint in (
        ([even] * 2, "2 experts came where 3 are needed"),
        ([even] * 4, "expert 4 of 3"),
        ([even, even, narrow], r"is \(8, 32\), others \(8, 64\)"),
    ):
        with pytest.raises(ValueError, match=complaint):
            Nf4Stack.from_experts(iter(experts), 3)


def test_memory_of_another_shape_or_layout_is_refused() -> None:
    stack = Nf4Stack.quantize(torch.randn(2, 8, 64))
    for wrong in (torch.empty(64, 8), torch.empty(64, 8).T):
        with pytest.raises(ValueError, match=r"out must be contiguous \(8, 64\)"):
            stack.expert(0, wrong)


def test_a_stack_looks_dense_and_holds_a_little_over_four_bits_a_value() -> None:
    weight = torch.randn(4, 192, 64, dtype=torch.bfloat16)
    stack = Nf4Stack.quantize(weight)
    assert (stack.shape, stack.dtype, stack.device) == (weight.shape, weight.dtype, weight.device)
    assert 4.0 <= 8 * stack.stored_bytes / weight.numel() < 4.5
    assert isinstance(torch.nn.Parameter(stack, requires_grad=False).data, Nf4Stack)


DENSE: dict[str, Callable[[Any], object]] = {
    "split": lambda stack: stack.split(1),
    "chunk": lambda stack: stack.chunk(2),
    "unbind": lambda stack: stack.unbind(),
    "iteration": list,
    "index": lambda stack: stack[0],
    "slice": lambda stack: stack[:1],
    "narrow": lambda stack: stack.narrow(0, 0, 1),
    "index_select": lambda stack: stack.index_select(0, torch.tensor([0])),
    "view": lambda stack: stack.view(-1),
    "reshape": lambda stack: stack.reshape(2, -1),
    "flatten": lambda stack: stack.flatten(),
    "transpose": lambda stack: stack.transpose(1, 2),
    "new_zeros": lambda stack: stack.new_zeros(3),
    "new_empty": lambda stack: stack.new_empty(3),
    "empty_like": torch.empty_like,
    "clone": lambda stack: stack.clone(),
    "contiguous copy": lambda stack: stack.clone(memory_format=torch.contiguous_format),
    "cat": lambda stack: torch.cat([stack, stack]),
    "stack": lambda stack: torch.stack([stack, stack]),
    "sum": lambda stack: stack + 0,
    "product": lambda stack: torch.ones(2, 3, 8) @ stack,
    "write": lambda stack: stack.add_(1.0),
    "copy into": lambda stack: stack.copy_(torch.zeros(2, 8, 64)),
    "copy out": lambda stack: torch.empty(2, 8, 64).copy_(stack),
}


@pytest.mark.parametrize("operation", DENSE.values(), ids=DENSE)
def test_an_operation_that_would_make_a_stack_dense_is_refused(operation: Callable[[Any], object]) -> None:
    stack = Nf4Stack.quantize(torch.randn(2, 8, 64))
    with pytest.raises(WeightsError, match=r"^4-bit expert stack: an operation would make .*; got .*; report this"):
        operation(stack)


def test_moving_a_stack_keeps_its_bits() -> None:
    stack = Nf4Stack.quantize(torch.randn(2, 8, 64))
    for moved in (stack.to("cpu"), stack.to(torch.bfloat16), stack.detach(), deepcopy(stack)):
        assert isinstance(moved, Nf4Stack)
        assert all(map(torch.equal, moved.stored, stack.stored))


def test_a_model_with_stacks_cannot_be_sharded(base: Path) -> None:
    """`fully_shard` splits every parameter by rows; a stack must not become a dense one by that."""
    with tempfile.TemporaryDirectory() as folder:
        init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            with pytest.raises(WeightsError, match=r"^4-bit expert stack: an operation would make the stack dense"):
                fully_shard(base_model(base), mesh=init_device_mesh("cpu", (1,)))
        finally:
            destroy_process_group()


def test_loading_quantises_attention_and_experts_and_nothing_else(base: Path) -> None:
    model = base_model(base)
    formats = {
        name: "nf4" if isinstance(p.data, Nf4Stack) or hasattr(p, "quant_state") else str(p.dtype)
        for name, p in model.named_parameters()
    }
    quantised = {name for name, stored in formats.items() if stored == "nf4"}
    assert quantised == {name for name in formats if ".self_attn." in name or ".experts." in name}
    assert {stored for name, stored in formats.items() if name not in quantised} == {"torch.float32"}


def test_the_loaded_values_are_those_of_quantising_the_published_tensors(base: Path) -> None:
    stacks = dict(base_model(base).named_parameters())
    dense = dict(base_model(base, load_in_4bit=False).named_parameters())
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(stacks[name].data.dequantize(), Nf4Stack.quantize(dense[name].data).dequantize())


def test_the_type_of_the_computation_changes_no_stored_bit(tmp_path: Path) -> None:
    folder = save_tiny_mixtral(tmp_path, dtype="bfloat16")
    loaded = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = base_model(folder, dtype=str(dtype).removeprefix("torch."))
        loaded[dtype] = model.get_parameter("model.layers.1.mlp.experts.gate_up_proj").data
        assert loaded[dtype].dtype == loaded[dtype].expert(0).dtype == dtype
    for stack in loaded.values():
        for stored, wanted in zip(stack.stored, loaded[torch.float32].stored, strict=True):
            assert torch.equal(stored, wanted)


def test_the_4bit_forward_equals_transformers_on_the_dequantised_weights(base: Path) -> None:
    model = base_model(base)
    torch.testing.assert_close(logits(model), logits(dense_twin(model, base)), atol=1e-5, rtol=1e-5)


def test_an_evaluation_does_not_change_the_gradients_that_follow(base: Path) -> None:
    """On CPUs with AVX512-BF16 a `Linear4bit` would repack itself in eval mode and lose its gradient."""
    gradients = []
    for evaluate_first in (False, True):
        model = trained_model(base)
        assert any(isinstance(module, Linear4bit) for module in model.modules())
        if evaluate_first:
            logits(model.eval())
        model.train()(IDS).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for without, with_evaluation in zip(*gradients, strict=True):
        assert torch.equal(without, with_evaluation)
