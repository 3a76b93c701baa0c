"""4-bit loading: linear layers and expert stacks are quantised while the checkpoint's shards stream in.

`load_in_4bit` of transformers replaces `nn.Linear` only; a Mixtral keeps 96 % of its weights in stacked parameters
`[E, O, I]`, which stay in 16 bits. Here the same quantiser also covers the stacks, and reads them expert by expert: of
a stack that is written as one tensor an expert, no more than one expert is ever in memory in 16 bits. Which weights
become NF4 can be asked by name and shape, without loading them.

E experts, O output features, I input features.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from transformers import BitsAndBytesConfig
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from finetune.errors import Problem, WeightsError
from finetune.model_files import build_config
from finetune.moe.families import FAMILIES, QUANTIZED_PARTS, family_of
from finetune.moe.nf4 import BLOCKSIZE, Nf4Part, Nf4Stack, linear_weight
from finetune.moe.stored_bytes import Share, StackBytes
from finetune.upstream import private, require, require_reads

_LOADER = "transformers.core_model_loading"
_QUANTIZER = "transformers.quantizers.quantizer_bnb_4bit:Bnb4BitHfQuantizer"
ConversionOps: Any = private(f"{_LOADER}:ConversionOps")
MergeModulelist: Any = private(f"{_LOADER}:MergeModulelist")
WeightConverter: Any = private(f"{_LOADER}:WeightConverter")

QUANT_METHOD = "moe_nf4"

_USED = (
    f"{_LOADER}:ConversionOps.convert",
    f"{_LOADER}:WeightConverter.materialize_tensors",
    f"{_LOADER}:WeightConverter._original_source_patterns",
    f"{_LOADER}:WeightConverter._original_target_patterns",
    f"{_LOADER}:WeightConverter.collected_tensors",
    f"{_LOADER}:WeightConverter.scope_prefix",
    f"{_LOADER}:WeightConverter.base_model_prefix",
    f"{_QUANTIZER}.get_modules_to_not_convert",
    f"{_QUANTIZER}.param_needs_quantization",
    f"{_QUANTIZER}.get_quantize_ops",
    f"{_QUANTIZER}.update_weight_conversions",
    f"{_QUANTIZER}._process_model_after_weight_loading",
)


class _UnreadConverter(WeightConverter):  # type: ignore[misc]
    """A loader's rule whose tensors are left unread for its operation, which gets a function for each."""

    __slots__ = ()

    def materialize_tensors(self) -> dict[str, list[Any]]:
        unread = dict(self.collected_tensors)
        self.collected_tensors.clear()
        return unread


class _ByExpert(ConversionOps):  # type: ignore[misc]
    """The loader's own operations (stack the experts, `w1` over `w3`), carried out on one expert at a time."""

    def __init__(self, operations: list[Any]) -> None:
        self.operations = operations

    def convert(
        self, input_dict: dict[str, list[Any]], *, target_patterns: list[str], full_layer_name: str, **kwargs: Any
    ) -> dict[str, Any]:
        kwargs |= {"target_patterns": target_patterns, "full_layer_name": full_layer_name}
        if is_expert_stack(kwargs["model"], full_layer_name):
            return {target_patterns[0]: [partial(self._expert, input_dict, kwargs)]}
        return self._run({name: [read() for read in unread] for name, unread in input_dict.items()}, kwargs)

    def _expert(self, input_dict: dict[str, list[Any]], kwargs: dict[str, Any], index: int) -> torch.Tensor:
        """One expert's matrix `[O, I]`, read now."""
        one = {name: [unread[index]()] for name, unread in input_dict.items()}
        matrix: torch.Tensor = next(iter(self._run(one, kwargs).values()))[0]
        return matrix

    def _run(self, tensors: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        for operation in self.operations:
            tensors = operation.convert(tensors, **kwargs)
        return tensors


class _Quantize(ConversionOps):  # type: ignore[misc]
    """Loader operation: stacks become `Nf4Stack`s, linear weights go to bitsandbytes' own operation."""

    def __init__(self, linear_operation: Any, damaged: list[str], share: Share | None) -> None:
        self.linear_operation = linear_operation
        self.damaged = damaged
        self.share = share

    def convert(self, input_dict: dict[str, Any], *, model: torch.nn.Module, **kwargs: Any) -> dict[str, Any]:
        name, value = next(iter(input_dict.items()))
        if isinstance(value, list):
            (value,) = value
        extremes: list[torch.Tensor] = []
        first = None
        if is_expert_stack(model, name):
            whole = model.get_parameter(name)
            stack = self._quantize(whole, value if callable(value) else value.__getitem__, extremes)
            first = stack.held.start if isinstance(stack, Nf4Part) else 0
            loaded = {name: torch.nn.Parameter(stack, requires_grad=False)}
        else:
            extremes.append(extremes_of(value))
            loaded = self.linear_operation.convert({name: value}, model=model, **kwargs)
        finite = torch.stack(extremes).isfinite().all(dim=-1) if extremes else torch.ones(0)  # one copy from the device
        self.damaged += [
            name if first is None else f"{name}, expert {first + index}"
            for index, is_finite in enumerate(finite.tolist())
            if not is_finite
        ]
        return loaded

    def _quantize(
        self, whole: torch.Tensor, read: Callable[[int], torch.Tensor], extremes: list[torch.Tensor]
    ) -> Nf4Stack:
        """The experts of this process; all of them where the model is not sharded. `whole`: on the meta device."""
        num_experts = whole.shape[0]
        if self.share is None:
            return Nf4Stack.from_experts(_watched(read, range(num_experts), extremes), num_experts)
        layout = StackBytes(whole.shape, whole.dtype)
        experts = _watched(read, layout.experts(self.share), extremes)
        return layout.quantize_part(self.share, experts)


def _watched(
    read: Callable[[int], torch.Tensor], experts: range, extremes: list[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Read experts one by one, and note each one's extremes: NF4 would turn a NaN into an ordinary number."""
    for expert in experts:
        weight_OI = read(expert)
        extremes.append(extremes_of(weight_OI))
        yield weight_OI


def extremes_of(weight: torch.Tensor) -> torch.Tensor:
    """Smallest and largest value, on the weight's device; NaN if it holds one. 0.1 ns a value, no temporary."""
    return torch.stack(torch.aminmax(weight))


def _not_finite(name: str, folder: str) -> Problem:
    do = f"fetch the checkpoint again, or repair this tensor in {folder}"
    return Problem(name, "holds NaN or infinity", do)


def is_expert_stack(model: torch.nn.Module, name: str) -> bool:
    """Whether parameter `name` of `model` is a stack `[E, O, I]` of a module that dispatches experts."""
    module, parameter_name = get_module_from_name(model, name)
    parameter = getattr(module, parameter_name, None)
    return hasattr(module, "is_transposed") and parameter is not None and parameter.ndim == 3


def check_weights(model: Any, load_in_4bit: bool, folder: str) -> None:
    """Refuse a loaded model whose checkpoint holds NaN or infinity anywhere, or with a stack that is not in 4 bits.

    One such value in a router sends every token of its layer to arbitrary experts, and nothing later says why.
    """
    problems = []
    names, extremes = [], []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if load_in_4bit and is_expert_stack(model, name) and not isinstance(tensor.data, Nf4Stack):
            problems.append(Problem(name, "was to be 4-bit and is not", "report this", got=str(tensor.dtype)))
        if tensor.is_floating_point() and not isinstance(tensor.data, Nf4Stack) and tensor.numel():
            names.append(name)
            extremes.append(extremes_of(tensor).to(model.device, torch.float32))
    finite = torch.stack(extremes).isfinite().all(dim=-1).tolist()  # one device-to-host copy
    damaged = [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
    damaged += model.hf_quantizer.damaged if load_in_4bit else []
    problems += [_not_finite(name, folder) for name in damaged]
    if problems:
        raise WeightsError(problems)


class UnevenLinear4bit(Linear4bit):  # type: ignore[misc]
    """A layer whose rows are not whole blocks, on a CPU: bitsandbytes' own forward gives them the maxima of others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return torch.nn.functional.linear(x.to(dtype), linear_weight(self.weight).to(dtype), bias).to(x.dtype)


@register_quantization_config(QUANT_METHOD)
class MoeNf4Config(BitsAndBytesConfig):  # type: ignore[misc]
    """bitsandbytes NF4 with double quantisation for linear layers *and* expert stacks."""

    def __init__(self, compute_dtype: torch.dtype = torch.float32, share: Share | None = None, **_: Any) -> None:
        """`share`: of a sharded model, what this process reads of each expert stack."""
        super().__init__(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
        self.quant_method = QUANT_METHOD
        self.share = share


@register_quantizer(QUANT_METHOD)
class MoeNf4Quantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """transformers' bitsandbytes quantiser, extended to expert stacks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        require(*_USED)
        require_reads("bitsandbytes.nn:Linear4bit.forward")
        super().__init__(*args, **kwargs)
        if self.pre_quantized:
            what, do = "the checkpoint is already quantised", "give the 16-bit checkpoint it was made from"
            raise WeightsError(Problem("config.json: quantization_config", what, do, got=QUANT_METHOD))
        self.damaged: list[str] = []  # weights that hold NaN or infinity: an exception in the loader would be lost

    @staticmethod
    def get_modules_to_not_convert(model: torch.nn.Module, *args: Any, **kwargs: Any) -> list[str]:
        """transformers' own list (head, tied weights) and every linear layer that the table does not quantise."""
        kept: list[str] = Bnb4BitHfQuantizer.get_modules_to_not_convert(model, *args, **kwargs)
        config: Any = model.config
        family = FAMILIES[config.model_type]  # transformers' loader hands on nothing but the model
        linear = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        return kept + [name for name in linear if family.part(name) not in QUANTIZED_PARTS]

    def param_needs_quantization(self, model: torch.nn.Module, param_name: str, **kwargs: Any) -> bool:
        linear: bool = super().param_needs_quantization(model, param_name, **kwargs)
        return linear or is_expert_stack(model, param_name)

    def get_quantize_ops(self) -> _Quantize:
        return _Quantize(super().get_quantize_ops(), self.damaged, self.quantization_config.share)

    def update_weight_conversions(self, weight_conversions: list[Any], model: torch.nn.Module) -> list[Any]:
        """Have the rules that stack experts run expert by expert."""
        updated: list[Any] = super().update_weight_conversions(weight_conversions, model)
        return [_by_expert(rule) if _stacks_experts(rule) else rule for rule in updated]

    def _process_model_after_weight_loading(self, model: torch.nn.Module, **kwargs: Any) -> torch.nn.Module:
        """Keep linear layers in their training layout on CPUs with AVX512-BF16, and to their own values.

        There bitsandbytes 0.50 repacks a `Linear4bit` at its first forward in eval mode, for good: all later forwards
        round to bfloat16 and have no gradient with respect to their input, without an error.
        """
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = False
                if module.weight.device.type == "cpu" and module.in_features % BLOCKSIZE:
                    module.__class__ = UnevenLinear4bit
        loaded: torch.nn.Module = super()._process_model_after_weight_loading(model, **kwargs)
        return loaded

    def is_serializable(self) -> bool:
        """Full 4-bit checkpoints are not written; the adapter is what a run saves."""
        return False


def _stacks_experts(rule: Any) -> bool:
    """Whether a loader's rule makes one stack from one tensor an expert, by operations that keep experts apart."""
    if not isinstance(rule, WeightConverter) or len(rule.target_patterns) != 1:
        return False
    first, *others = rule.operations
    # Along axis 0 are the experts; an operation along another axis does the same to each of them.
    return isinstance(first, MergeModulelist) and first.dim == 0 and all(getattr(op, "dim", 0) > 0 for op in others)


def _by_expert(rule: Any) -> _UnreadConverter:
    unread = _UnreadConverter(
        rule._original_source_patterns, rule._original_target_patterns, operations=[_ByExpert(rule.operations)]
    )
    unread.scope_prefix, unread.base_model_prefix = rule.scope_prefix, rule.base_model_prefix
    return unread


@dataclass(frozen=True)
class QuantizedWeights:
    """Shapes by name: of linear layers [O, I] (`...q_proj.weight`) and of expert stacks [E, O, I]."""

    linear: dict[str, tuple[int, ...]]
    stacks: dict[str, tuple[int, ...]]


def quantized_weights(config: dict[str, Any], folder: Path) -> QuantizedWeights:
    """The NF4 weights of a model with this `config.json`, from an empty model as before loading."""
    model_config = build_config(config, folder)
    model_class: Any = family_of(model_config.model_type, "config.json: model_type").transformers_class()
    with torch.device("meta"):
        model = getattr(model_class, "from_config", model_class)(model_config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    MoeNf4Quantizer(MoeNf4Config(), pre_quantized=False).preprocess_model(model, device_map=None)
    linear = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    stacks = [name for name in shapes if is_expert_stack(model, name)]
    return QuantizedWeights({name: shapes[name] for name in linear}, {name: shapes[name] for name in stacks})
