"""Friendly target names -> a plain PEFT configuration; PEFT's parameters, our forward.

Adapters stay stock PEFT adapters on disk. In memory, PEFT's wrapper of a stacked parameter builds `W + s B A` for every
expert on every forward; `FactoredStackLora` replaces that forward and hands the factors to `finetune.moe.experts`.
"""

import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper

from finetune.errors import Problem, RecipeError, WeightsError
from finetune.moe.factors import ExpertFactors
from finetune.moe.families import Family, family_of
from finetune.recipe import LoraSettings


class FactoredStackLora(ParamWrapper):  # type: ignore[misc]
    """PEFT's wrapper of one expert stack, without materialising the delta.

    Layout of PEFT's two matrices: `lora_A [E*r, in]` is expert-major, `lora_B [out, E*r]` is rank-major
    (`peft.tuners.lora.layer.ParamWrapper.get_delta_weight`).

    `chosen`: adapters that hold the factors of some experts only (`finetune.moe.chosen`), and of which.
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
        """The probability in force: none outside of training."""
        dropout: Any = self.lora_dropout[adapter]
        return dropout.p if dropout.training and isinstance(dropout, torch.nn.Dropout) else 0.0

    def merge(self, *_: Any, **__: Any) -> None:
        """Refused: a 4-bit stack cannot take a delta."""
        raise WeightsError(
            Problem("adapter", "a loaded expert stack cannot be merged in memory", "use `finetune merge ADAPTER`")
        )


def lora_config(lora: LoraSettings, family: Family) -> LoraConfig:
    """The PEFT configuration that a recipe's `lora` section means for one architecture."""
    modules: list[str] = []
    parameters: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for target in lora.targets:
        if target == "attention":
            modules += family.attention
        elif target == "mlp":
            modules += family.dense_mlp or _refuse(family, target)
        elif target == "router":
            moe = family.moe or _refuse(family, target)
            parameters.append(f"{moe.router_module}.weight")
        elif target == "experts":
            moe = family.moe or _refuse(family, target)
            for stack in moe.stacks:
                name = f"{moe.experts_module}.{stack.parameter}"
                parameters.append(name)
                ranks[name] = lora.expert_r or lora.r
                alphas[name] = lora.expert_lora_alpha or lora.lora_alpha
        elif target in ("embed_tokens", "lm_head"):
            what = "embeddings and head take no adapter"
            raise RecipeError(Problem("lora.targets", what, "use attention, experts, router or mlp", got=target))
        else:
            modules.append(target)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        # PEFT refuses dropout beside stacked parameters, even to load an adapter; `add_adapter` sets it itself.
        lora_dropout=0.0 if parameters else lora.lora_dropout,
        use_rslora=lora.use_rslora,
        target_modules=sorted(set(modules)),
        target_parameters=sorted(set(parameters)) or None,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != lora.r},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != lora.lora_alpha},
    )


def _refuse(family: Family, target: str) -> NoReturn:
    """This architecture has no such part."""
    instead = "mlp" if family.moe is None else "experts"
    raise RecipeError(Problem("lora.targets", f"{family.model_type} has no {target}", f"use {instead}", got=target))


def add_adapter(model: Any, lora: LoraSettings) -> PeftModel:
    """Wrap `model` with a fresh adapter (B = 0, so the output does not change) and its factored expert forward.

    Trains exactly the adapter: everything else is frozen first, as PEFT leaves unrelated parameters as it finds them.
    """
    family = family_of(model.config.model_type, "config.json: model_type")
    config = lora_config(lora, family)
    _refuse_unmatched(model, config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with warnings.catch_warnings():
        # PEFT looks for rank patterns among modules only and warns about parameters, whose ranks it does apply; the
        # audit reads the ranks that stand in memory.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys", category=RuntimeWarning)
        peft_model = get_peft_model(model, config)
    factor_stacks(peft_model)
    if lora.lora_dropout:
        _set_dropout(peft_model, lora.lora_dropout)
    return peft_model


def _set_dropout(model: torch.nn.Module, probability: float) -> None:
    """Dropout on the input of every adapter, those of expert stacks included."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for adapter in module.lora_dropout:
                module.lora_dropout[adapter] = torch.nn.Dropout(probability)


def _refuse_unmatched(model: Any, config: LoraConfig) -> None:
    """PEFT only warns about a target that matches nothing; here it is an error."""
    names = [name for name, _ in model.named_modules()]
    unmatched = [
        target
        for target in config.target_modules
        if not any(name == target or name.endswith(f".{target}") for name in names)
    ]
    if unmatched:
        raise RecipeError(
            Problem(
                "lora.targets",
                "matches no module of this model",
                "use attention, experts, router, mlp, or a module name that exists",
                got=", ".join(unmatched),
            )
        )


def factor_stacks(model: torch.nn.Module) -> None:
    """Swap PEFT's materialising wrappers of 3-D parameters for the factored one and connect it to the experts."""
    wrappers: list[Any] = [module for module in model.modules() if type(module) is ParamWrapper]
    for wrapper in wrappers:
        if wrapper.num_experts == 1:
            continue  # a router: a matrix of a few rows, which PEFT's own forward serves well
        wrapper.__class__ = FactoredStackLora
        experts = wrapper.get_base_layer()
        # A plain dict, so that torch does not register the wrapper as a child of what it wraps.
        experts.__dict__.setdefault("lora_sources", {})[wrapper.parameter_name] = wrapper
