"""Load any tool's adapter into a model through stock PEFT, as the proof's reference.

Adapters of transformers 4 name a Linear for each expert, where the loaded model of transformers 5 has stacked
parameters. Modules with the old names are laid over the same memory, so that PEFT applies the adapter's own settings
(patterns, dropout). PEFT's own conversion of such adapters supports neither dropout nor rank patterns, and scales
rank-stabilised ones differently from their training.

Factors in another order are rearranged to PEFT's. This code is independent of the merge's arithmetic, which the proof
compares with it. E experts, r rank, x features of the file's `lora_A`, y those of its `lora_B`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from finetune.adapters.adapter import CONFIG_FILE, Adapter
from finetune.adapters.factor_layouts import resolved_targets
from finetune.adapters.lineage import Weighted
from finetune.adapters.targets import ALL_LINEAR, StackOrder, Target, is_unstacked
from finetune.adapters.tensors import EMBEDDING, HEAD, PREFIX
from finetune.checkpoint import CheckpointReader, TensorInfo
from finetune.checkpoint.reader import read_tensor
from finetune.errors import Problem, WeightsError
from finetune.model_files import reading
from finetune.moe.families import Family


def foreign_stacks(base: CheckpointReader, adapter: Adapter, family: Family) -> list[Target]:
    """The stacks whose factors are not as PEFT 0.21 writes them."""
    stacks = [target for target in resolved_targets(base, adapter, family) if target.experts > 1]
    return [stack for stack in stacks if stack.order != StackOrder() or stack.path != stack.peft_path]


def as_peft(factors: Mapping[str, torch.Tensor], stacks: Iterable[Target]) -> dict[str, torch.Tensor]:
    """The factors by the names that PEFT 0.21 gives them; of those in `stacks` in its order."""
    rearranged = dict(factors)
    held = [stack for stack in stacks if _name(stack.path, "A") in factors]
    pairs = [(rearranged.pop(_name(stack.path, "A")), rearranged.pop(_name(stack.path, "B"))) for stack in held]
    for stack, (A, B) in zip(held, pairs, strict=True):
        A_Erx = A.reshape(stack.experts, -1, A.shape[1])
        if stack.order.expert_major:
            B_Ery = B.reshape(len(B), stack.experts, -1).permute(1, 2, 0)
        else:
            B_Ery = B.reshape(len(B), -1, stack.experts).permute(2, 1, 0)
        if stack.order.swapped:
            A_Erx, B_Ery = B_Ery, A_Erx
        rearranged[_name(stack.peft_path, "A")] = A_Erx.flatten(0, 1).contiguous()
        rearranged[_name(stack.peft_path, "B")] = B_Ery.permute(2, 1, 0).flatten(1).contiguous()
    return rearranged


def _name(path: str, factor: str) -> str:
    return f"{PREFIX}{path}.lora_{factor}.weight"


def unstacked_modules(model: Any, index: int, family: Family, config: PeftConfig) -> nn.Module:
    """The linear modules and embeddings of `model` as a tree, with those of transformers 4 for the stacks and router.

    Only decoder layer `index` of the model is whole.
    """
    root = nn.Module()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            _put(root, path, module)
    for name, weight in _matrices(model.get_decoder().layers[index], family):
        _put(root, f"model.layers.{index}.{name}", _linear(weight))
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        root._modules.pop("lm_head", None)  # PEFT leaves it out of a whole model
    return root


def _matrices(layer: nn.Module, family: Family) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of experts and router, where the layer has them, by the names that their modules had."""
    moe, held = family.moe, dict(layer.named_parameters())
    if moe is None or moe.router_parameter not in held:
        return
    yield moe.disk_router.removesuffix(".weight"), held[moe.router_parameter].detach()
    for stack in moe.stacks if moe.per_expert else ():
        stack_EOI = held[f"{moe.experts_module}.{stack.parameter}"].detach()
        for name, part_EOI in zip(stack.disk_names, stack_EOI.chunk(len(stack.disk_names), dim=1), strict=True):
            for expert, weight_OI in enumerate(part_EOI):
                yield moe.disk_expert.format(expert=expert, name=name).removesuffix(".weight"), weight_OI


def _linear(weight: torch.Tensor) -> nn.Linear:
    """A Linear over the memory of `weight`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, last = path.split(".")
    node = root
    for name in parents:
        if name not in node._modules:
            node.add_module(name, nn.Module())
        node = node.get_submodule(name)
    node.add_module(last, module)


VOCABULARY = tuple(f".{key.removesuffix('.weight')}." for key in (EMBEDDING, HEAD))


def with_adapter(
    model: Any,
    weighted: Weighted,
    tensors: Mapping[str, TensorInfo],
    index: int,
    foreign: Sequence[Target],
    family: Family,
) -> Any:
    """The model, of which decoder layer `index` is whole, under one adapter.

    `tensors`: of the adapter, those for what the model holds; `foreign`: its stacks in another order. An adapter of
    transformers 4 is merged into the model, whose parameters its modules are parts of; any other one is left to PEFT's
    own forward.
    """
    with reading(weighted.adapter.folder / CONFIG_FILE, "PEFT cannot read it"):
        config = PeftConfig.from_pretrained(str(weighted.adapter.folder))
    config.auto_mapping = None  # names a class to import; nothing here needs it
    config.inference_mode, config.base_model_name_or_path = True, None
    config.lora_dropout = 0.0  # does nothing in a forward that is not training, and PEFT refuses it on stacks
    used = {key: info for key, info in tensors.items() if key not in weighted.adapter.spare}
    values = {key: _weighted(key, read_tensor(info), weighted.weight) for key, info in used.items()}
    _name_what_is_there(config, values)
    unstacked = is_unstacked(weighted.adapter, family)
    if unstacked:
        config.task_type = None  # a plain tree of modules has no `generate`
        adapted = PeftModel(unstacked_modules(model, index, family, config), config, low_cpu_mem_usage=True)
    else:
        values = as_peft(values, foreign)
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    unknown = set_peft_model_state_dict(adapted, values, low_cpu_mem_usage=True).unexpected_keys
    lacking = _fill_vocabulary(adapted)
    if unknown or lacking:
        what = "the adapter's tensors and the modules that its settings name differ"
        got = ", ".join(sorted(unknown + lacking)[:3])
        raise WeightsError(Problem(str(weighted.adapter.folder), what, "save the adapter again", got))
    if unstacked:
        adapted.merge_adapter()
        _keep_whole(adapted)
        return model
    return adapted.eval()


def _weighted(key: str, value: torch.Tensor, weight: float) -> torch.Tensor:
    return value * weight if "lora_B" in key or "lora_embedding_B" in key else value


def _name_what_is_there(config: Any, values: Mapping[str, torch.Tensor]) -> None:
    """Have the settings name no module whose whole tensors or rows are not among the values.

    A head that PEFT adapted because it was tied to the embedding is named as any other: here they are two matrices.
    """
    if not any("token_adapter" in key for key in values):
        config.trainable_token_indices = None
    saved = [name for name in config.modules_to_save or [] if any(f".{name}.weight" in f".{key}" for key in values)]
    config.modules_to_save = saved or None
    if config.ensure_weight_tying and any(key.startswith(f"{PREFIX}lm_head.lora") for key in values):
        targets = config.target_modules
        config.target_modules = rf"(?:{targets}|lm_head)" if isinstance(targets, str) else {*targets, "lm_head"}
    config.ensure_weight_tying = False


def _keep_whole(adapted: nn.Module) -> None:
    """Copy what was trained whole into the modules that it stands in front of."""
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for name, parameter in module.original_module.named_parameters():
                parameter.data.copy_(module.modules_to_save["default"].get_parameter(name))


def _fill_vocabulary(adapted: nn.Module) -> list[str]:
    """Parameters that got no value; those of an embedding or head that no hidden state passes here become zero."""
    lacking = [name for name, parameter in adapted.named_parameters() if parameter.is_meta]
    for name in [name for name in lacking if any(part in f".{name}" for part in VOCABULARY)]:
        path, _, last = name.rpartition(".")
        module = adapted.get_submodule(path)
        zeros = torch.zeros(module.get_parameter(last).shape)
        setattr(module, last, nn.Parameter(zeros, requires_grad=False))
        lacking.remove(name)
    return lacking
