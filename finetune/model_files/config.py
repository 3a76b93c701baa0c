"""`config.json` of a checkpoint: validated by the meaning of its keys, then transformers' configuration of it.

Counts, sizes and numbers must lie within bounds that no published model comes near, whatever the architecture. Keys
that choose code, kernels of the hub or other files are left out: the recipe decides.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import Problem, WeightsError
from finetune.files import check_all_regular
from finetune.model_files.settings import FETCH_AGAIN, read_settings, reading

CONFIG_FILE = "config.json"
LAYERS = 1024
"""The deepest published model has 126."""
CHOOSES_CODE = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_internal",
        "_experts_implementation",
        "_experts_implementation_internal",
        "attn_implementation",
        "auto_map",
        "configuration_files",
        "custom_generate",
        "custom_pipelines",
        "distributed_config",
        "experts_implementation",
        "kernel_config",
        "transformers_weights",
        "use_kernels",
    }
)
"""Keys of a config.json that name code, kernels of the hub or other files. The recipe decides; these are left out."""

_COUNT = 2**16
_SIZE = 2**24
_LARGEST = 2**53
# The first pattern that a key matches as a whole: what its value must be, if it is a number, and from where to where.
_BOUNDS: tuple[tuple[str, str, float, float], ...] = (
    (r"num_hidden_layers|num_layers|n_layers?", "a whole number", 1, LAYERS),
    (r"num_nextn_predict_layers|first_k_dense_replace", "a whole number", 0, LAYERS),
    (r"hidden_size|vocab_size|num_attention_heads|num_key_value_heads|head_dim", "a whole number", 1, _SIZE),
    (r"(num|n)_\w*|\w*_(layers|experts|heads|groups?)|topk_group", "a whole number", 0, _COUNT),
    (r"\w*_(size|dim|rank|step|freq|interval)", "a whole number", 0, _SIZE),
    (r"\w*max_position_embeddings", "a whole number", 1, 2**40),
    (r"sliding_window|max_window_layers|\w*chunk_size", "a whole number", 0, 2**40),
    (r"(bos|eos|pad|unk)_token_id", "a whole number", -1, _SIZE),
    (r"\w*_eps(ilon)?", "a number", 0, 1),
    (r"\w*dropout\w*|\w*_pdrop", "a number", 0, 1),
    (r"\w*rope_theta|rotary_emb_base", "a number", 1e-3, 1e15),
    (r"factor|\w*_factor", "a number", 0, 1e6),
    (r"initializer_range", "a number", 0, 1e3),
)
_PATTERNS = tuple((re.compile(pattern), what, low, high) for pattern, what, low, high in _BOUNDS)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "moe_top_k", "num_experts_per_token", "top_k_experts")
_TEMPLATES = "additional_chat_templates"
_ADAPTER_FILE, _SHARDED_FILE = "adapter_config.json", ".metadata"


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint, as it is written. Raises WeightsError for values that no model has."""
    file = folder / CONFIG_FILE
    settings = read_settings(file)
    problems = [*_too_large(file, settings), *_absurd(file, settings), *_contradictions(file, settings)]
    nested = settings.get("text_config")
    if isinstance(nested, dict):
        problems += [*_absurd(file, nested), *_contradictions(file, nested)]
    if problems:
        raise WeightsError(problems[:10])
    return settings


def check_values(file: Path, settings: Mapping[str, Any]) -> None:
    """Raise WeightsError for values that no model has, in settings that another file than a config.json holds."""
    if problems := [*_too_large(file, settings), *_absurd(file, settings), *_contradictions(file, settings)]:
        raise WeightsError(problems[:10])


def without_code(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without the keys that choose code, kernels or files, in nested ones too."""
    return {
        name: without_code(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in CHOOSES_CODE
    }


def load_config(folder: Path) -> Any:
    """transformers' configuration of the checkpoint in `folder`; it names no code, and nothing is fetched for it."""
    return build_config(read_config(folder), folder)


def build_config(settings: Mapping[str, Any], folder: Path) -> Any:
    """transformers' configuration of settings that were read from `config.json` in `folder`."""
    from transformers import CONFIG_MAPPING

    _refuse_detours(folder)
    where, plain = folder / CONFIG_FILE, _with_floats(without_code(settings))
    kind = plain.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        what = "names no architecture that transformers knows"
        raise WeightsError(Problem(f"{where}: model_type", what, "see `finetune families`", got=str(kind)))
    with reading(where):
        return CONFIG_MAPPING[kind].from_dict(plain, name_or_path=str(folder))


def vocabulary_size(folder: Path) -> int:
    """The number of tokens in the vocabulary, by `config.json`."""
    return int(load_config(folder).vocab_size)


def check_model_folder(folder: Path) -> None:
    """Raise where a folder that a library is to read holds something that is no regular file, or leads elsewhere."""
    check_all_regular(folder)
    if (folder / _TEMPLATES).is_dir():
        check_all_regular(folder / _TEMPLATES)
    _refuse_detours(folder)


def _refuse_detours(folder: Path) -> None:
    """transformers would load an adapter beside the weights on top of them, and a sharded state in their place."""
    for name, what in ((_ADAPTER_FILE, "an adapter"), (_SHARDED_FILE, "a sharded training state")):
        if (folder / CONFIG_FILE).is_file() and (folder / name).exists():
            do = "move it away: the weights of a base are read from safetensors alone"
            raise WeightsError(Problem(str(folder / name), f"is {what} in the folder of a checkpoint", do))


def _with_floats(settings: Any) -> Any:
    """Floats that transformers writes as {"__float__": "Infinity"}, as they are."""
    if isinstance(settings, dict):
        if settings.keys() == {"__float__"} and settings["__float__"] in ("Infinity", "-Infinity"):
            return float(settings["__float__"])
        return {name: _with_floats(value) for name, value in settings.items()}
    return [_with_floats(value) for value in settings] if isinstance(settings, list) else settings


def _too_large(file: Path, settings: Any, name: str = "") -> Iterator[Problem]:
    """Whole numbers that no float holds, wherever they stand."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield from _too_large(file, value, f"{name}.{key}" if name else str(key))
    elif isinstance(settings, list):
        for value in settings:
            yield from _too_large(file, value, name)
    elif isinstance(settings, int) and abs(settings) > _LARGEST:
        got = f"a number of {len(str(abs(settings)))} digits"
        yield Problem(f"{file}: {name}", f"is beyond {_LARGEST}", FETCH_AGAIN, got)


def _absurd(file: Path, settings: Mapping[str, Any]) -> Iterator[Problem]:
    """Values beyond the bounds of their keys; values of other types are left to transformers."""
    rope = [value for name in ("rope_parameters", "rope_scaling") if isinstance(value := settings.get(name), dict)]
    for name, value in [item for each in (settings, *rope) for item in each.items()]:
        if name in ("rope_parameters", "rope_scaling") and not isinstance(value, dict | None):
            yield Problem(f"{file}: {name}", "must be an object", FETCH_AGAIN, got=json.dumps(value)[:80])
            continue
        found = next(((what, low, high) for pattern, what, low, high in _PATTERNS if pattern.fullmatch(name)), None)
        if found is None or value is None or isinstance(value, dict | list):
            continue
        what, low, high = found
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high or (what != "a number" and value != int(value)):
            must = f"must be {what} from {low:,} to {high:,}"
            yield Problem(f"{file}: {name}", must, FETCH_AGAIN, got=json.dumps(value)[:80])


def _contradictions(file: Path, settings: Mapping[str, Any]) -> Iterator[Problem]:
    """Settings that are possible each, but not together."""
    counts = {name: value for name, value in settings.items() if type(value) is int}
    experts = next((counts[name] for name in _EXPERTS if name in counts), None)
    for name in _TOP_K:
        if experts and name in counts and not 1 <= counts[name] <= experts:
            must = f"must be from 1 to the number of experts, {experts}"
            yield Problem(f"{file}: {name}", must, FETCH_AGAIN, got=str(counts[name]))
    heads, shared = counts.get("num_attention_heads"), counts.get("num_key_value_heads")
    if heads and shared and heads % shared:
        what = f"must divide num_attention_heads, {heads}"
        yield Problem(f"{file}: num_key_value_heads", what, FETCH_AGAIN, got=str(shared))
