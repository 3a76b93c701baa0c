"""One adapter on a loaded model through stock PEFT, whoever wrote it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from finetune.adapters.contents import EMBEDDING, HEAD, PREFIX
from finetune.adapters.lineage import Weighted
from finetune.adapters.targets import Target, is_unstacked
from finetune.checkpoint import TensorInfo
from finetune.checkpoint.reader import read_tensor
from finetune.errors import Problem, WeightsError
from finetune.merge.rearranged import as_peft
from finetune.merge.unstacked import unstacked_modules
from finetune.moe.families import Family

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
    config = PeftConfig.from_pretrained(str(weighted.adapter.folder))
    config.inference_mode, config.base_model_name_or_path = True, None
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
