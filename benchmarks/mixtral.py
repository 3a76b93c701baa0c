"""Whole Mixtral models of random 4-bit or dense weights, made layer by layer without a checkpoint or a 16-bit copy.

E experts, O output features, I input features, Q quantisation blocks of one expert, N packed bytes of one expert.
"""

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

from benchmarks.arms import STACKS
from benchmarks.shapes import Shape
from finetune.moe.experts import EXPERTS_IMPLEMENTATION
from finetune.moe.lora import factor_stacks
from finetune.moe.nf4 import BLOCKSIZE, NESTED_BLOCKSIZE, Nf4Stack

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def mixtral_config(shape: Shape, layers: int, vocabulary: int) -> MixtralConfig:
    """Heads of 128 features where the hidden size allows, 4 query heads a key, as Mixtral-8x7B has them."""
    heads = max(4, shape.hidden // 128)
    return MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        vocab_size=vocabulary,
        max_position_embeddings=32768,
        sliding_window=None,
        use_cache=False,
    )


def random_mixtral(
    config: MixtralConfig, dtype: torch.dtype, device: str, quantised: bool = True, quantised_experts: bool = True
) -> Any:
    """A frozen random model on `device`: attention and experts in NF4 where so asked, all else in `dtype`."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    for layer in model.model.layers:
        for name in ATTENTION:
            linear = getattr(layer.self_attn, name)
            setattr(layer.self_attn, name, _linear(linear, dtype, device, quantised))
        for name in STACKS:
            shape = getattr(layer.mlp.experts, name).shape
            stack = random_stack(shape, dtype, device) if quantised_experts else _normal(shape, dtype, device)
            setattr(layer.mlp.experts, name, nn.Parameter(stack, requires_grad=False))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                value = torch.ones(parameter.shape, dtype=dtype, device=device)
                value = value if parameter.ndim == 1 else value.normal_(std=0.02)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = MixtralRotaryEmbedding(config).to(device)  # its buffer has no checkpoint either
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, left
    model.is_loaded_in_4bit = quantised  # PEFT asks for it, and takes its own layer for 4-bit linears
    fit_older_transformers(model)
    return model.train()


def fit_older_transformers(model: Any) -> None:
    """Two names that the toolkit uses and that transformers before 5.23 lacks: a GPU machine's image may be older."""
    for module in model.modules():
        if hasattr(module, "is_transposed") and not hasattr(module, "_is_expert_parallel"):
            module._is_expert_parallel = False
    for verb in ("enable", "disable"):
        if not hasattr(model, f"activation_checkpointing_{verb}"):
            setattr(model, f"activation_checkpointing_{verb}", getattr(model, f"gradient_checkpointing_{verb}"))


def _normal(shape: torch.Size, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02)


def _linear(linear: Any, dtype: torch.dtype, device: str, quantised: bool) -> nn.Module:
    weight_OI = _normal(linear.weight.shape, dtype, device)
    if not quantised:
        dense = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(weight_OI, requires_grad=False)
        return dense
    four_bit: Any = Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    four_bit.weight = Params4bit(
        weight_OI, requires_grad=False, compress_statistics=True, quant_type="nf4", module=four_bit
    ).to(device)
    four_bit.support_avx512bf16_for_cpu = False  # as the product's loader does
    layer: nn.Module = four_bit
    return layer


def random_stack(shape: torch.Size, dtype: torch.dtype, device: str) -> Nf4Stack:
    """A stack `[E, O, I]` of random codes with block maxima of 0.03 to 0.07, as weights of deviation 0.02 have."""
    E, blocks = shape[0], shape[1:].numel() // BLOCKSIZE
    packed_EN = torch.randint(0, 256, (E, shape[1:].numel() // 2), dtype=torch.uint8, device=device)
    absmax_EQ = torch.randint(0, 256, (E, blocks), dtype=torch.uint8, device=device)
    nested_absmax_ES = torch.full((E, -(-blocks // NESTED_BLOCKSIZE)), 0.02, device=device)
    return Nf4Stack((packed_EN, absmax_EQ, nested_absmax_ES, torch.full((E,), 0.05, device=device)), shape, dtype)


def adapt_mixtral(
    model: Any,
    rank: int,
    implementation: str = EXPERTS_IMPLEMENTATION,
    factored: bool = True,
    experts_adapted: bool = True,
) -> Any:
    """LoRA on attention and experts: ours, or PEFT's own `target_parameters` with a stock experts implementation."""
    model.config._experts_implementation = implementation
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = implementation
    torch.manual_seed(1)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(ATTENTION),
        target_parameters=[f"mlp.experts.{name}" for name in STACKS] if experts_adapted else None,
    )
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert ".lora_" in name
            nn.init.normal_(parameter, std=0.02)
    if factored:
        factor_stacks(adapted)
    return adapted
