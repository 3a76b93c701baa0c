"""Floor 4: base model and adapter, loaded as the recipe says."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig

import finetune
from finetune.checkpoint import CheckpointReader, read_json
from finetune.data.tokenizer import added_ids, load_tokenizer
from finetune.errors import Problem, RecipeError, WeightsError
from finetune.moe.checkpointing import enable_checkpointing
from finetune.moe.earlier import EarlierAdapter
from finetune.moe.esft.adapter import keep_chosen
from finetune.moe.esft.choice import ExpertChoice
from finetune.moe.experts import EXPERTS_IMPLEMENTATION
from finetune.moe.families import Family, family_of
from finetune.moe.lora import add_adapter
from finetune.moe.quantizer import MoeNf4Config, refuse_damaged
from finetune.moe.rehearsal import differences, refuse_quantized, rehearse
from finetune.moe.router_bias import BIAS_FILE, require_biases, save_biases
from finetune.moe.targets import lora_config, refuse_absent
from finetune.moe.vocabulary import grow_vocabulary, refuse_outside
from finetune.recipe import FRIENDLY_TARGETS, ModelSettings, Recipe

_MAKERS = ("peft", "torch", "transformers", "trl", "bitsandbytes")
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "tokenizer*"]


def resolve_checkpoint(settings: ModelSettings, weights: bool = True) -> Path:
    """The local folder of the base checkpoint; a hub id is fetched (safetensors, never pickles).

    Without `weights` only its config and its tokenizer are fetched; what lies in a local folder lies there.
    """
    folder = Path(settings.name_or_path)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or settings.name_or_path.count("/") != 1 or settings.name_or_path.startswith("."):
        raise WeightsError(
            Problem(
                "model.name_or_path",
                "no such folder",
                "give a checkpoint folder or a hub id owner/name",
                got=str(folder),
            )
        )
    patterns = [*_SMALL_FILES, "*.safetensors"] if weights else _SMALL_FILES
    try:
        return Path(snapshot_download(str(folder), revision=settings.revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise WeightsError(
            Problem(
                "model.name_or_path",
                f"neither a folder here nor a model that can be fetched ({type(error).__name__})",
                "check the path or hub id, the network and, for gated models, `hf auth login`",
                got=settings.name_or_path,
            )
        ) from error


def checkpoint_family(folder: Path, recipe: Recipe) -> Family:
    """The checkpoint's architecture; refused where recipe and checkpoint do not fit it. Reads headers, no weights."""
    reader = CheckpointReader(folder)
    family = config_family(folder, recipe, partial(_refuse_targets, reader))
    refuse_quantized(reader)
    rehearse(reader, family.transformers_class(), recipe.model.load_in_4bit, **_options(recipe.model))
    return family


def config_family(folder: Path, recipe: Recipe, *further: Callable[[Family, Recipe], None]) -> Family:
    """The architecture by `config.json` alone, refused where the recipe does not fit it."""
    config = read_json(folder / "config.json")
    family = family_of(str(config.get("model_type")), str(folder / "config.json"))
    refusals: list[Callable[[Family, Recipe], None]] = [_refuse_router_section, _refuse_bias_balance, *further]
    refusals += [_refuse_attention, _refuse_packing, partial(_refuse_length, config)]
    problems: list[Problem] = []
    for refuse in refusals:
        try:
            refuse(family, recipe)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return family


def architecture_config(folder: Path) -> Any:
    """transformers' configuration of a checkpoint, with its defaults."""
    return AutoConfig.from_pretrained(folder)


def _refuse_router_section(family: Family, recipe: Recipe) -> None:
    """A router section stands in the recipe exactly if there is a router."""
    if family.moe is not None and recipe.router is None:
        raise RecipeError(
            Problem(
                "router",
                f"{family.model_type} is a Mixture-of-Experts model and the recipe has no router section",
                "add router.router_aux_loss_coef (0 turns the balance term off; the checkpoint's own is never used)",
            )
        )
    if family.moe is None and recipe.router is not None:
        raise RecipeError(
            Problem("router", f"{family.model_type} is a dense model without a router", "remove the router section")
        )


def _refuse_bias_balance(family: Family, recipe: Recipe) -> None:
    """Correction biases can be moved only where there are some."""
    if family.moe is not None and recipe.router is not None and recipe.router.bias_update_rate:
        require_biases(family, recipe.router.bias_update_rate)


def _refuse_targets(reader: CheckpointReader, family: Family, recipe: Recipe) -> None:
    """What is to be adapted must be there."""
    lora_config(recipe.lora, family)
    on_disk = [key.removesuffix(".weight") for key in reader.keys]  # of linear modules the same names as in the model
    refuse_absent(set(recipe.lora.targets) & set(FRIENDLY_TARGETS), family, on_disk)


def _refuse_packing(family: Family, recipe: Recipe) -> None:
    if family.unpackable and recipe.data.packing:
        what = f"rows of {family.model_type} cannot be packed: {family.unpackable}"
        raise RecipeError(Problem("data.packing", what, "write packing: false", got="true"))


def _refuse_length(config: dict[str, Any], family: Family, recipe: Recipe) -> None:
    """No row may be longer than what the model tells positions apart in; packed rows count from 0 each."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int):
        return
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    stretched = rope.get("original_max_position_embeddings", positions) * rope.get("factor", 1)
    reach = max(positions, int(stretched))
    if recipe.data.max_length > reach:
        what = f"longer than the {reach} positions of this {family.model_type} (max_position_embeddings)"
        do = f"write at most {reach}, or use a checkpoint whose config.json says how it is stretched further"
        raise RecipeError(Problem("data.max_length", what, do, got=str(recipe.data.max_length)))


def _refuse_attention(family: Family, recipe: Recipe) -> None:
    """The attention code must be one that the architecture has, and installed."""
    where, name = "model.attn_implementation", recipe.model.attn_implementation
    if name not in family.attn_implementations:
        do = f"write {' or '.join(family.attn_implementations)}"
        raise RecipeError(Problem(where, f"{family.model_type} has no such attention code", do, got=name))
    if name == "flash_attention_2" and find_spec("flash_attn") is None:
        raise RecipeError(
            Problem(where, "the package flash_attn is not installed", "install it, or use sdpa", got=name)
        )


def _options(settings: ModelSettings) -> dict[str, Any]:
    """Options of `from_pretrained` that decide what is built."""
    return {
        "dtype": getattr(torch, settings.dtype),
        "attn_implementation": settings.attn_implementation,
        "experts_implementation": EXPERTS_IMPLEMENTATION,
    }


def recipe_tokenizer(folder: Path, recipe: Recipe) -> tuple[Any, list[int]]:
    """The checkpoint's tokenizer as the recipe has it, and the ids of the tokens that the recipe adds.

    Raises what `load_tokenizer` raises, and WeightsError for one with tokens that the checkpoint has no rows for.
    """
    settings = recipe.model
    tokenizer = load_tokenizer(str(folder), None, recipe.data.chat_template, settings.added_tokens, settings.eos_token)
    new_tokens = added_ids(tokenizer, settings.added_tokens)
    rows = int(read_json(folder / "config.json")["vocab_size"])
    refuse_outside(rows, max(tokenizer.get_vocab().values()), len(new_tokens), str(folder))
    return tokenizer, new_tokens


def load_base(folder: Path, settings: ModelSettings, new_tokens: Sequence[int] = ()) -> Any:
    """The base model on this process's device, its linear layers and expert stacks in NF4 if the recipe says so.

    `new_tokens`: ids from `recipe_tokenizer`, which get rows of embedding and head. Raises WeightsError for a
    checkpoint that lacks or holds anything else than the architecture asks for, and for weights that are not finite.
    """
    reader = CheckpointReader(folder)
    family = family_of(str(reader.config.get("model_type")), str(folder / "config.json"))
    options = _options(settings)
    rehearse(reader, family.transformers_class(), settings.load_in_4bit, **options)
    if settings.load_in_4bit:
        options["quantization_config"] = MoeNf4Config(compute_dtype=options["dtype"])
    model, report = family.transformers_class().from_pretrained(
        folder,
        device_map={"": PartialState().device},
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    if problems := differences(str(folder), report):
        raise WeightsError(problems)
    refuse_damaged(model, settings.load_in_4bit, str(folder))
    grow_vocabulary(model, new_tokens)
    model.config.use_cache = False
    return model


def load_model(folder: Path, recipe: Recipe, new_tokens: Sequence[int] = ()) -> PeftModel:
    """Base model with a fresh adapter, ready to train."""
    return adapt(load_base(folder, recipe.model, new_tokens), recipe, new_tokens=new_tokens)


def adapt(
    base: Any,
    recipe: Recipe,
    choice: ExpertChoice | None = None,
    new_tokens: Sequence[int] = (),
    earlier: EarlierAdapter | None = None,
) -> PeftModel:
    """A loaded base model with an adapter, of all experts or of the chosen ones, ready to train: a fresh one, or the
    `earlier` one.

    The adapter has the rows of `new_tokens`, which `load_base` was given as well.
    """
    model = add_adapter(base, recipe.lora, new_tokens)
    if choice is not None:
        keep_chosen(model, choice.experts)
    if earlier is not None:
        earlier.load_into(model, family_of(model.config.model_type, recipe.model.name_or_path))
    # DDP would broadcast the frozen base, tensor by tensor, from rank 0 over what every rank has read itself; a 4-bit
    # stack cannot be written to. The adapter, initialised at random, is still synchronised.
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)  # type: ignore[no-untyped-call]
    enable_checkpointing(model, recipe.training.gradient_checkpointing)
    return model


def save_adapter(
    model: PeftModel,
    folder: Path,
    recipe: Recipe,
    base: dict[str, Any],
    choice: ExpertChoice | None = None,
    earlier: EarlierAdapter | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a stock PEFT adapter and, beside it, `finetune.json` with what PEFT's format cannot say.

    `facts`: what else it is to say of its training.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = recipe.model.name_or_path, recipe.model.revision
    model.save_pretrained(folder, save_embedding_layers=False)
    record = {
        "format": 1,
        "base": base,
        "layout": {"expert_lora": "A:expert-major,B:rank-major"},
        "experts": None if choice is None else choice.as_dict(),
        "added_tokens": dict(zip(recipe.model.added_tokens, new_tokens_of(model), strict=True)),
        "quantization": "nf4" if recipe.model.load_in_4bit else None,
        "dtype": recipe.model.dtype,
        # What it went on from: one of this toolkit's, told by the hash of its weights.
        "adapter": None if earlier is None else {"name_or_path": recipe.model.adapter, "sha256": earlier.digest()},
        **({"router_bias": BIAS_FILE} if _save_router_bias(model, folder, recipe, earlier) else {}),
        **(facts or {}),
        "recipe": recipe.model_dump(mode="json"),
        "versions": {"moe-finetune": finetune.__version__, **{name: version(name) for name in _MAKERS}},
    }
    (folder / "finetune.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def new_tokens_of(model: PeftModel) -> list[int]:
    """The ids whose rows an adapter holds, ascending."""
    indices: dict[str, list[int]] = model.peft_config["default"].trainable_token_indices or {}
    return next(iter(indices.values()), [])


def _save_router_bias(model: PeftModel, folder: Path, recipe: Recipe, earlier: EarlierAdapter | None) -> bool:
    """Write the correction biases where this training or an earlier one has moved them; returns whether one has."""
    moe = family_of(model.config.model_type, str(folder)).moe
    moved = recipe.router is not None and recipe.router.bias_update_rate > 0
    if moe is None or not (moved or (earlier is not None and earlier.has_biases)):
        return False
    save_biases(model, moe, folder)
    return True
