"""The adapter in the model: PEFT's parameters with our forward, and rows of added tokens.

Adapters stay stock PEFT adapters on disk. In memory, PEFT's wrapper of a stacked parameter builds `W + s B A` for every
expert on every forward; `FactoredStackLora` replaces that forward and hands the factors to `finetune.moe.experts`.

The recipe's target names become a plain PEFT configuration of the architecture. For most MoE models PEFT 0.21 takes
`gate_proj`, `up_proj` and `down_proj` in `target_modules` as the experts of older adapters, whatever module they belong
to: an adapter of a dense layer or of shared experts would become one of the experts. Such layers are therefore named in
`target_parameters` (`mlp.gate_proj.weight`), which PEFT takes as written. The saved tensors have the same names and
shapes either way; in memory the layers are ordinary LoRA layers.

Of added tokens only their rows of the embedding, and of an untied head, are trained (`trainable_token_indices`). PEFT
keeps them separately and substitutes them for the base's rows, so that a saved adapter holds their full values.
"""

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.functional import cast_adapter_dtype
from peft.tuners.lora.layer import LoraLayer, ParamWrapper

from finetune.errors import Problem, RecipeError, WeightsError
from finetune.moe.dropout import InputDropout, LoraDropout, TokenKeys
from finetune.moe.engine.routed_rows import ExpertFactors
from finetune.moe.families import Family
from finetune.moe.nf4_loading import UnevenLinear4bit
from finetune.recipe import FRIENDLY_TARGETS, LoraSettings
from finetune.upstream import clean_name, require

require(
    "peft.tuners.lora.model:LoraModel._create_and_replace", "peft.tuners.lora.layer:ParamWrapper._check_forward_args"
)

ADAPTER = "default"
_PEFT_RENAMES = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
_NO_MODULES = "dummy-target-modules"  # PEFT's marker for `target_modules` being empty on purpose


def lora_config(lora: LoraSettings, family: Family) -> LoraConfig:
    """The PEFT configuration that a recipe's `lora` section means for one architecture."""
    modules: list[str] = []
    parameters: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    _check_known(lora.targets, family)
    moe = family.moe
    for target in lora.targets:
        if target == "router" and moe is not None:
            parameters.append(moe.router_parameter)
        elif target == "experts" and moe is not None:
            for stack in moe.stacks:
                name = f"{moe.experts_module}.{stack.parameter}"
                parameters.append(name)
                ranks[name] = lora.expert_r or lora.r
                alphas[name] = lora.expert_lora_alpha or lora.lora_alpha
        else:
            for name in linear_modules(target, family):
                renamed = moe is not None and name.rpartition(".")[2] in _PEFT_RENAMES
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


def _instead(family: Family, given: Collection[str]) -> str:
    """What to do about a wrong target: use another one that is not given yet."""
    others = [target for target in family.targets if target not in given]
    return f"remove it, or use {' or '.join(others)}" if others else "remove it"


def _check_known(targets: Sequence[str], family: Family) -> None:
    """Raise RecipeError for each part that this architecture lacks or that takes no adapter."""
    problems = []
    for target in targets:
        if target in ("embed_tokens", "lm_head"):
            what = "embeddings and head take no adapter"
        elif target in FRIENDLY_TARGETS and target not in family.targets:
            what = f"{family.model_type} has no {target}"
        else:
            continue
        problems.append(Problem("lora.targets", what, _instead(family, targets), got=target))
    if problems:
        raise RecipeError(problems)


def check_targets(targets: Collection[str], family: Family, modules: Collection[str]) -> None:
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
        what, do = "matches no module of this model", _instead(family, targets)
        if target in FRIENDLY_TARGETS:
            what = f"this checkpoint has no {target}, though other models of type {family.model_type} may have"
        else:
            do += ", or a module name that exists"
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


def check_vocabulary(rows: int, highest_id: int, added: int, where: str) -> None:
    """Raise WeightsError if the tokenizer has ids without an embedding row; `added`: ids that the recipe adds.

    `rows`: of the checkpoint's embedding; `highest_id`: of the tokenizer with the added tokens.
    """
    if highest_id - added >= rows:
        raise WeightsError(
            Problem(
                where,
                f"the tokenizer has tokens outside the model's embedding of {rows} rows",
                "use the checkpoint's own tokenizer, and name the new tokens in model.added_tokens",
                got=f"id {highest_id - added}",
            )
        )


def grow_vocabulary(model: Any, tokens: Sequence[int]) -> None:
    """Initialise the rows of new ids (ascending, above all known ones) with the mean of the known tokens' rows.

    A checkpoint may have spare rows after its vocabulary: their values are arbitrary, so they are set as well. The
    matrices are extended only where they have no row for an id.
    """
    if not tokens:
        return
    _check_head(model)
    if tokens[-1] >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(tokens[-1] + 1, mean_resizing=False)
    # The row of the checkpoint's pad token gets no gradient, and its id may have been a spare one until now.
    model.get_input_embeddings().padding_idx = None
    with torch.no_grad():
        for module in vocabulary_modules(model).values():
            # The noise that transformers adds to the mean is 3e-5 of the rows' own deviation: bfloat16 rounds it away.
            module.weight[list(tokens)] = module.weight[: tokens[0]].mean(0, dtype=torch.float32).to(module.weight)


def vocabulary_modules(model: Any) -> dict[str, Any]:
    """Embedding and, where it has a weight of its own, head of a base model, by path."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    wanted = [embedding] if head.weight is embedding.weight else [embedding, head]
    return {name: module for name, module in model.named_modules() if any(module is layer for layer in wanted)}


def complete_head(model: Any) -> None:
    """Give PEFT's wrapper of the head the attribute `bias` of a linear layer, which TRL's fused loss reads."""
    model.get_output_embeddings().bias = None


def _check_head(model: Any) -> None:
    """Raise RecipeError unless the head is a linear layer without bias, as PEFT's rows of new tokens require."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None:
        what = f"the head of {model.config.model_type} has a bias, or is no linear layer: its rows cannot be trained"
        raise RecipeError(Problem("model.added_tokens", what, "take the added tokens out", got=type(head).__name__))


class FactoredStackLora(ParamWrapper):  # type: ignore[misc]
    """PEFT's wrapper of one expert stack, without materialising the delta.

    Layout of PEFT's two matrices: `lora_A [E*r, in]` is expert-major, `lora_B [out, E*r]` is rank-major
    (`peft.tuners.lora.layer.ParamWrapper.get_delta_weight`).

    `chosen`: the experts of adapters that do not adapt all of them (`finetune.moe.esft`).
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

    def _dropout(self, adapter: str) -> InputDropout | None:
        """Of the present micro-batch; None outside of training."""
        dropout: Any = self.lora_dropout[adapter]
        return dropout.now(self.num_experts) if isinstance(dropout, LoraDropout) else None

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
    """Dropout on the input of every adapter, those of expert stacks included; they share their tokens' keys."""
    token_keys = TokenKeys()
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer) or type(module) is ParamWrapper:
            continue  # a router's adapter has none: it is added to the weight
        place = f"{path}.{module.parameter_name}" if isinstance(module, ParamWrapper) else path
        for adapter in module.lora_dropout:
            module.lora_dropout[adapter] = LoraDropout(probability, clean_name(f"{place}.{adapter}"), token_keys)


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
