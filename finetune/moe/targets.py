"""Translate friendly target names into a plain PEFT configuration for one architecture.

For most MoE models PEFT 0.21 takes `gate_proj`, `up_proj` and `down_proj` in `target_modules` as the experts of older
adapters, whatever module they belong to: an adapter of a dense layer or of shared experts would become one of the
experts. Such layers are therefore named in `target_parameters` (`mlp.gate_proj.weight`), which PEFT takes as
written. The saved tensors have the same names and shapes either way; in memory the layers are ordinary LoRA layers.
"""

from collections.abc import Collection, Iterable
from typing import Any, NoReturn

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.functional import cast_adapter_dtype

from finetune.errors import Problem, RecipeError
from finetune.moe.families import Family
from finetune.moe.quantizer import UnevenLinear4bit
from finetune.recipe import FRIENDLY_TARGETS, LoraSettings

ADAPTER = "default"
_PEFT_RENAMES = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
_NO_MODULES = "dummy-target-modules"  # PEFT's marker for `target_modules` being empty on purpose


def lora_config(lora: LoraSettings, family: Family) -> LoraConfig:
    """The PEFT configuration that a recipe's `lora` section means for one architecture."""
    modules: list[str] = []
    parameters: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for target in lora.targets:
        if target in ("embed_tokens", "lm_head"):
            what = "embeddings and head take no adapter"
            raise RecipeError(Problem("lora.targets", what, f"use {_choices(family)}", got=target))
        if target == "router":
            parameters.append((family.moe or _unsupported(family, target)).router_parameter)
        elif target == "experts":
            moe = family.moe or _unsupported(family, target)
            for stack in moe.stacks:
                name = f"{moe.experts_module}.{stack.parameter}"
                parameters.append(name)
                ranks[name] = lora.expert_r or lora.r
                alphas[name] = lora.expert_lora_alpha or lora.lora_alpha
        else:
            for name in linear_modules(target, family) or _unsupported(family, target):
                renamed = family.moe is not None and name.rpartition(".")[2] in _PEFT_RENAMES
                (parameters if renamed else modules).append(f"{name}.weight" if renamed else name)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        # PEFT refuses dropout beside `target_parameters`, even to load an adapter; `add_adapter` sets it itself.
        lora_dropout=0.0 if parameters else lora.lora_dropout,
        use_rslora=lora.use_rslora,
        target_modules=sorted(set(modules)),
        target_parameters=sorted(set(parameters)) or None,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != lora.r},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != lora.lora_alpha},
    )


def linear_modules(target: str, family: Family) -> tuple[str, ...]:
    """Suffixes of the linear modules that one target names; any other name is a module name itself."""
    moe = family.moe
    friendly = {
        "attention": family.attention,
        "mlp": family.dense_mlp,
        "shared_experts": moe.shared if moe is not None else (),
    }
    return friendly.get(target, (target,))


def _choices(family: Family) -> str:
    return f"{', '.join(family.targets[:-1])} or {family.targets[-1]}"


def _unsupported(family: Family, target: str) -> NoReturn:
    """Raise RecipeError: this architecture has no such part."""
    what = f"{family.model_type} has no {target}"
    raise RecipeError(Problem("lora.targets", what, f"use {_choices(family)}", got=target))


def check_targets(targets: Iterable[str], family: Family, modules: Collection[str]) -> None:
    """Raise RecipeError where a target of linear modules matches none of `modules`; PEFT would only warn.

    `modules`: paths in the model, or names of tensors on disk without `.weight`.
    """
    problems = []
    for target in targets:
        if target in ("experts", "router"):
            continue
        names = linear_modules(target, family)
        if any(_matches(path, names) for path in modules):
            continue
        what = "matches no module of this model"
        if target in FRIENDLY_TARGETS:
            what = f"this checkpoint has no {target}, though other models of type {family.model_type} may have"
        do = f"use {_choices(family)}, or a module name that exists"
        problems.append(Problem("lora.targets", what, do, got=target))
    if problems:
        raise RecipeError(problems)


def _matches(path: str, names: Iterable[str]) -> bool:
    return any(f".{path}".endswith(f".{name}") for name in names)


def attach(model: Any, config: LoraConfig) -> PeftModel:
    """`get_peft_model`, with ordinary LoRA layers for `target_parameters` that are weights of linear modules."""
    modules = [name for name in config.target_modules if _paths(model, [name])]
    parameters: list[str] = config.target_parameters or []
    linear = [name for name in parameters if _linear_paths(model, [name])]
    others = [name for name in parameters if name not in linear]
    config.target_modules = modules if modules or others else _NO_MODULES
    config.target_parameters = others or None
    adapted = get_peft_model(model, config)
    for path in _linear_paths(model, linear):
        parent, _, name = path.rpartition(".")
        layer, holder = model.get_submodule(path), model.get_submodule(parent)
        # What PEFT itself calls for every entry of `target_modules`.
        adapted.base_model._create_and_replace(config, ADAPTER, layer, name, holder, current_key=path)
    cast_adapter_dtype(adapted, ADAPTER)
    config.target_modules, config.target_parameters = modules, parameters or None
    return adapted


def _linear_paths(model: torch.nn.Module, parameters: Iterable[str]) -> list[str]:
    """Paths of the plain linear modules whose weights are among `parameters` (suffixes)."""
    names = [parameter.removesuffix(".weight") for parameter in parameters if parameter.endswith(".weight")]
    plain = (torch.nn.Linear, Linear4bit, UnevenLinear4bit)
    return [path for path in _paths(model, names) if type(model.get_submodule(path)) in plain]


def _paths(model: torch.nn.Module, names: Collection[str]) -> list[str]:
    return [path for path, _ in model.named_modules() if _matches(path, names)]
