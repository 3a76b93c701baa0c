"""The adapter in the model: PEFT's parameters with our forward.

Adapters stay stock PEFT adapters on disk. In memory, PEFT's wrapper of a stacked parameter builds `W + s B A` for every
expert on every forward; `FactoredStackLora` replaces that forward and hands the factors to `finetune.moe.experts`.
"""

import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper

from finetune.errors import Problem, WeightsError
from finetune.moe.engine.factors import ExpertFactors
from finetune.moe.families import Family
from finetune.moe.targets import attach, check_targets, lora_config
from finetune.moe.vocabulary import complete_head, vocabulary_modules
from finetune.recipe import LoraSettings


class FactoredStackLora(ParamWrapper):  # type: ignore[misc]
    """PEFT's wrapper of one expert stack, without materialising the delta.

    Layout of PEFT's two matrices: `lora_A [E*r, in]` is expert-major, `lora_B [out, E*r]` is rank-major
    (`peft.tuners.lora.layer.ParamWrapper.get_delta_weight`).

    `chosen`: the experts of adapters that do not adapt all of them (`finetune.moe.esft.adapter`).
    """

    chosen: Mapping[str, tuple[int, ...]] = MappingProxyType({})

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._check_forward_args(x, *args, **kwargs)
        output: torch.Tensor = self.base_layer(x, *args, **kwargs)
        return output

    def active_factors(self) -> list[ExpertFactors]:
        """Factors of the active adapters; none while adapters are disabled."""
        if self.disable_adapters:
            return []
        return [self._factors(name) for name in self.active_adapters if name in self.lora_A]

    def _factors(self, adapter: str) -> ExpertFactors:
        A, B, chosen = self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.chosen.get(adapter)
        S = self.num_experts if chosen is None else len(chosen)
        A_SrI = A.reshape(S, -1, A.shape[-1])
        B_SrO = B.T.contiguous().view(-1, S, B.shape[0]).transpose(0, 1)
        return ExpertFactors(A_SrI, B_SrO, self.scaling[adapter], self._dropout(adapter), chosen)

    def _dropout(self, adapter: str) -> float:
        """The current dropout probability: 0 outside of training."""
        dropout: Any = self.lora_dropout[adapter]
        return dropout.p if dropout.training and isinstance(dropout, torch.nn.Dropout) else 0.0

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """The experts without their factors, when PEFT removes the adapter."""
        experts: torch.nn.Module = super().unload_and_optionally_merge_module(*args, **kwargs)
        del experts.__dict__["lora_sources"]
        return experts

    def merge(self, *_: Any, **__: Any) -> None:
        """Raises WeightsError: a delta cannot be added to a 4-bit stack."""
        raise WeightsError(
            Problem("adapter", "a loaded expert stack cannot be merged in memory", "use `finetune merge ADAPTER`")
        )


FactoredStackLora.__name__ = ParamWrapper.__name__  # PEFT looks for this name when it adds a second adapter


def add_adapter(model: Any, family: Family, lora: LoraSettings, new_tokens: Sequence[int] = ()) -> PeftModel:
    """Wrap `model` with a fresh adapter (B = 0, so the output does not change) and its factored expert forward.

    Trains exactly the adapter, to which the rows of `new_tokens` belong: everything else is frozen first, as PEFT
    leaves unrelated parameters as it finds them.
    """
    config = lora_config(lora, family)
    if new_tokens:
        config.trainable_token_indices = {name: list(new_tokens) for name in vocabulary_modules(model)}
    check_targets(lora.targets, family, [name for name, _ in model.named_modules()])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with warnings.catch_warnings():
        # PEFT looks for rank patterns among modules only and warns about parameters, although it applies their
        # ranks; the audit reads the ranks in memory.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys", category=RuntimeWarning)
        peft_model = attach(model, config)
    factor_stacks(peft_model)
    if new_tokens:
        complete_head(peft_model)
    if lora.lora_dropout:
        _set_dropout(peft_model, lora.lora_dropout)
    return peft_model


def _set_dropout(model: torch.nn.Module, probability: float) -> None:
    """Dropout on the input of every adapter, those of expert stacks included."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for adapter in module.lora_dropout:
                module.lora_dropout[adapter] = torch.nn.Dropout(probability)


def factor_stacks(model: torch.nn.Module) -> None:
    """Replace PEFT's materialising wrappers of 3-D parameters by the factored one and connect it to the experts."""
    wrappers: list[Any] = [module for module in model.modules() if type(module) is ParamWrapper]
    for wrapper in wrappers:
        if wrapper.get_param().dim() == 2:
            continue  # a router: a small matrix, for which PEFT's own forward is fine
        wrapper.__class__ = FactoredStackLora
        experts = wrapper.get_base_layer()
        # A plain dict, so that torch does not register the wrapper as a child of what it wraps.
        experts.__dict__.setdefault("lora_sources", {})[wrapper.parameter_name] = wrapper
