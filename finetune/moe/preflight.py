"""Check from a checkpoint's headers whether it would load, before any weight is read.

transformers' loader leaves missing weights random and goes on, and a quantised stack may lack an expert without a
warning. So the same loader runs with the same rules on tensors without data (0.3 s for the 995 tensors of Mixtral
8x7B), and its report is read here instead of printed.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from finetune.checkpoint import CheckpointReader
from finetune.checkpoint.reader import TORCH_DTYPES
from finetune.errors import Problem, RecipeError, WeightsError
from finetune.model_files import load_config, reading
from finetune.moe.families import Family
from finetune.recipe import Recipe, RouterSettings
from finetune.upstream import private

get_model_conversion_mapping = private("transformers.conversion_mapping:get_model_conversion_mapping")
rename_source_key = private("transformers.core_model_loading:rename_source_key")
WeightConverter = private("transformers.core_model_loading:WeightConverter")
WeightRenaming = private("transformers.core_model_loading:WeightRenaming")

_DEQUANTIZED = (
    "write a bfloat16 copy: from_pretrained(..., quantization_config={}(dequantize=True)), then save_pretrained"
)
_REMEDIES = {"mxfp4": _DEQUANTIZED.format("Mxfp4Config"), "fp8": _DEQUANTIZED.format("FineGrainedFP8Config")}
_GIVE_16_BITS = "give the 16-bit checkpoint; model.load_in_4bit quantises it while loading"
_NARROW = ("F8_E4M3", "F8_E5M2", "U8", "I8")


def check_loadable(reader: CheckpointReader, model_class: Any, load_in_4bit: bool, **options: Any) -> None:
    """Load the headers as `model_class.from_pretrained` with `options` would load the weights.

    Raises WeightsError with every tensor that is missing, of another shape, left over, or stored in 8 bits or fewer,
    and with every expert stack that 4-bit loading would leave in 16 bits.
    """
    check_quantization(reader)
    check_layers(reader)
    config = load_config(reader.folder)
    empty = empty_model(model_class, config, reader.folder)
    problems = _expert_problems(reader, empty)
    if not problems:
        problems = _loader_problems(reader, type(empty), config, options)
    if not problems and load_in_4bit:
        problems = [_unreached(name) for name in unreached_experts(empty)]
    if problems:
        raise WeightsError(problems)


def check_layers(reader: CheckpointReader) -> None:
    """Raise WeightsError for more layers than there are weights for, before a model of so many is built."""
    layers = reader.config.get("num_hidden_layers")
    numbers = [int(match[1]) for key in reader.keys if (match := re.search(r"\blayers\.(\d{1,6})\.", key))]
    if numbers and isinstance(layers, int) and layers > max(numbers) + 1:
        where, what = f"{reader.folder / 'config.json'}: num_hidden_layers", f"the weights have {max(numbers) + 1}"
        raise WeightsError(Problem(where, what, "give a complete checkpoint", got=str(layers)))


def empty_model(model_class: Any, config: Any, folder: Path) -> Any:
    """The model of a configuration, without data; WeightsError where it says what cannot be built."""
    with reading(folder / "config.json", "no model can be built as it says"), torch.device("meta"):
        return getattr(model_class, "from_config", model_class)(config)


def check_router_term(folder: Path, family: Family, recipe: Recipe) -> None:
    """Raise RecipeError where a coefficient of the section `router` weighs a term without gradient.

    The adapter is put into the model without data: which parameters come before which router depends on the
    checkpoint's number of layers, and which of them have experts.
    """
    coefficients = {} if recipe.router is None or family.moe is None else _coefficients(recipe.router)
    if not coefficients or recipe.model.added_tokens or "router" in recipe.lora.targets:
        return  # rows of the embedding come before all routers
    from finetune.moe.lora import add_adapter
    from finetune.moe.router import reached_routers

    adapted = add_adapter(empty_model(family.transformers_class(), load_config(folder), folder), family, recipe.lora)
    if reached_routers(adapted, family):
        return
    what = "has no effect: nothing that lora.targets trains comes before a router of this checkpoint"
    do = "write 0, or add router or attention to lora.targets"
    raise RecipeError(
        [
            Problem(f"router.{name}", f"the {term} {what}", do, f"{value:g}")
            for name, (term, value) in coefficients.items()
        ]
    )


def _coefficients(router: RouterSettings) -> dict[str, tuple[str, float]]:
    """The coefficients that are not 0, with the names of their terms."""
    every = {
        "router_aux_loss_coef": ("balance term", router.router_aux_loss_coef),
        "router_z_loss_coef": ("z-loss", router.router_z_loss_coef),
    }
    return {name: (term, value) for name, (term, value) in every.items() if value}


def check_quantization(reader: CheckpointReader) -> None:
    """Refuse a checkpoint that is stored in 8 bits or fewer, with the way to 16 bits where transformers has one."""
    where = str(reader.folder / "config.json")
    config, nested = reader.config, reader.config.get("text_config")
    found = config.get("quantization_config") or (nested if isinstance(nested, dict) else {}).get("quantization_config")
    if found is not None:
        method = str(found.get("quant_method")) if isinstance(found, dict) else None
        do = _REMEDIES.get(str(method), _GIVE_16_BITS)
        raise WeightsError(Problem(where, "the checkpoint is already quantised", do, got=method))
    narrow = [key for key in reader.keys if reader.info(key).dtype in _NARROW]
    if narrow:
        got = f"{narrow[0]} in {reader.info(narrow[0]).dtype}"
        what = f"{len(narrow)} tensors are stored in 8 bits or fewer, and config.json does not say how to read them"
        raise WeightsError(Problem(str(reader.folder), what, _GIVE_16_BITS, got))


def _expert_problems(reader: CheckpointReader, model: Any) -> list[Problem]:
    """Experts that a per-expert checkpoint lacks, or holds in another shape or number format than their fellows."""
    problems = []
    for (stack, _), keys in _sources(reader, model).items():
        numbers = {int(_expert_number(key).group(1)): key for key in keys}
        any_key = keys[0]
        for number in sorted(set(range(model.get_parameter(stack).shape[0])) - set(numbers)):
            match = _expert_number(any_key)
            absent = f"{any_key[: match.start(1)]}{number}{any_key[match.end(1) :]}"
            what = f"the checkpoint has no such tensor; {stack} needs one for each expert"
            problems.append(Problem(f"{reader.folder}: {absent}", what, "give a complete checkpoint"))
        shapes = {key: reader.info(key).shape for key in keys}
        usual, _ = Counter(shapes.values()).most_common(1)[0]
        problems += [
            Problem(
                f"{reader.info(key).file}: {key}",
                f"its fellow experts are {list(usual)}",
                "fetch the checkpoint again, or give the one that config.json describes",
                got=str(list(shape)),
            )
            for key, shape in shapes.items()
            if shape != usual
        ]
        formats = Counter(reader.info(key).dtype for key in keys)
        if len(formats) > 1:
            others = [key for key in keys if reader.info(key).dtype != formats.most_common(1)[0][0]]
            what = f"experts of {stack} are stored in differing number formats, and a stack has one"
            got = ", ".join(f"{count} in {dtype}" for dtype, count in formats.most_common())
            do = "save all of them in one: load the checkpoint with transformers in one dtype, and save_pretrained"
            problems.append(Problem(f"{reader.info(others[0]).file}: {others[0]}", what, do, got=got))
    return problems


def _sources(reader: CheckpointReader, model: Any) -> dict[tuple[str, str], list[str]]:
    """Tensors of the checkpoint that become one stack, by stack and by the loader's pattern that finds them."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    parameters = model.state_dict()
    sources = defaultdict(list)
    for key in reader.keys:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if pattern is not None and "*" in pattern and name in parameters:
            sources[name, pattern].append(key)
    return sources


def _expert_number(key: str) -> re.Match[str]:
    """The last part of a tensor's name that is a number: the layer's comes before it."""
    return list(re.finditer(r"(?<=\.)(\d+)(?=\.)", key))[-1]


def _loader_problems(reader: CheckpointReader, model_class: Any, config: Any, options: dict[str, Any]) -> list[Problem]:
    """What transformers' own loader has to say about the headers."""
    infos = {key: reader.info(key) for key in reader.keys}
    headers = {
        key: torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device="meta") for key, info in infos.items()
    }
    with _quiet(), reading(reader.folder, "transformers cannot load its headers", "give a complete checkpoint"):
        try:
            _, report = model_class.from_pretrained(
                None,
                config=config,
                state_dict=headers,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are reported with everything else
                **options,
            )
        except RuntimeError as error:
            do = "give a checkpoint in the published layout of its architecture"
            return [Problem(str(reader.folder), "transformers cannot convert the checkpoint's tensors", do, str(error))]
    return differences(str(reader.folder), report)


def differences(folder: str, report: dict[str, Any]) -> list[Problem]:
    """What transformers' loading info says of tensors that are missing, of another shape, or left over."""
    return [
        Problem(folder, f"checkpoint and architecture differ: {kind}", "give a complete checkpoint", got)
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys")
        if (got := ", ".join(map(_named, sorted(report[kind], key=str)[:3])))
    ]


def _named(key: str | tuple[str, torch.Size, torch.Size]) -> str:
    return key if isinstance(key, str) else f"{key[0]} is {list(key[1])}, must be {list(key[2])}"


def unreached_experts(model: nn.Module) -> list[str]:
    """Experts that 4-bit loading would leave in 16 bits: neither linear layers nor stacks that are dispatched."""
    from finetune.moe.nf4_loading import is_expert_stack

    return [
        name
        for path, module in model.named_modules()
        if not isinstance(module, nn.Linear | nn.Embedding | private("torch.nn.modules.conv:_ConvNd"))
        for local_name, parameter in module.named_parameters(recurse=False)
        for name in [f"{path}.{local_name}"]
        if (parameter.ndim == 3 or (parameter.ndim == 2 and ".experts." in name and not name.endswith("bias")))
        and not is_expert_stack(model, name)
    ]


def _unreached(name: str) -> Problem:
    what = "these experts would stay in 16 bits: transformers does not dispatch them through ExpertsInterface"
    return Problem(name, what, "use a supported architecture (`finetune families`), or model.load_in_4bit: false")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no report of the loader: its findings are raised as errors."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
