"""Read a PEFT LoRA adapter folder: its settings, its record, and the positions of its factors in the file."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.adapters.record import (
    EXPERT_LAYOUT,
    RECORD_FILE,
    SAVE_AGAIN,
    AdapterRecord,
    MergeSources,
    read_record,
    wrong_type,
)
from finetune.adapters.tensors import EMBEDDING, FactorPair, read_contents
from finetune.checkpoint import SUMS_FILE, listed_files, verify_sums
from finetune.checkpoint.reader import TensorInfo, pickles_in, read_json, read_tensor
from finetune.errors import Problem, WeightsError
from finetune.files import open_regular
from finetune.moe.router_bias import BIAS_FILE
from finetune.upstream import private

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
EXPORT_FILE = "export.json"  # in a folder that was written for another program
# Settings that leave W + scale * B A as it is, and `trainable_token_indices` and `modules_to_save`, which are read
# apart. Any other one that is switched on changes what the adapter computes.
NEUTRAL_SETTINGS = frozenset(
    {
        "peft_type",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_version",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "lora_dropout",
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "megatron_core",
        "qalora_group_size",
        "trainable_token_indices",
        "modules_to_save",
        "ensure_weight_tying",
        "lora_B_layout",
    }
)
# What Unsloth writes since it says in which order it trained the columns of a stack's `lora_B`; true: by expert, then
# rank. Until then only `auto_mapping` named it.
DECLARED_ORDERS = {"rank_major": False, "grouped_by_expert": True}
# The others (PiSSA, OLoRA, LoftQ, ...) change the base weights when training starts.
NEUTRAL_INITS = (True, False, "gaussian", "eva")
# What decides, with the factors, what an adapter computes.
DECIDING_SETTINGS = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "trainable_token_indices",
    "modules_to_save",
)
_TRAINER_FILES = ("trainer_state.json", "router_balance.json")
TRAINING_FILES = (
    *("training_state.json", "training_state.safetensors"),
    *("identity.json", *_TRAINER_FILES),
)
"""In a checkpoint, besides the adapter: what a run needs to continue from it."""
_MODULE = re.compile(r"[\w.]+")
_NAMES = ("target_modules", "target_parameters", "exclude_modules", "layers_pattern")
_TYPES: Mapping[str, tuple[str, tuple[type, ...]]] = {
    "rank_pattern": ("an object", (dict,)),
    "alpha_pattern": ("an object", (dict,)),
    "target_modules": ("a list of names or text", (list, str)),
    "target_parameters": ("a list of names", (list,)),
    "exclude_modules": ("a list of names or text", (list, str)),
    "layers_pattern": ("a list of names or text", (list, str)),
    "base_model_name_or_path": ("text", (str,)),
    "revision": ("text", (str,)),
    "trainable_token_indices": ("a list or an object", (list, dict)),
    "layers_to_transform": ("a list or a whole number", (list, int)),
    "auto_mapping": ("an object", (dict,)),
}


@dataclass(frozen=True)
class Adapter:
    """One adapter folder; `pairs` by the wrapped module's path in the loaded model (`base_layer` nesting included).

    `rows` are those of single tokens, [n, H], by the path of embedding or head; `tokens` says which, by PEFT's names of
    the same modules (their last parts). `whole` are tensors of the base's kind, by their names in the loaded model;
    `spare` tensors say nothing that others do not. `record` is empty for an adapter of another tool.
    """

    folder: Path
    settings: dict[str, Any]
    pairs: dict[str, FactorPair]
    rows: dict[str, TensorInfo]
    whole: dict[str, TensorInfo]
    spare: tuple[str, ...]
    tokens: dict[str, tuple[int, ...]]
    record: AdapterRecord
    asked_layout: str | None = None  # what the user says about the order of the experts' factors

    @property
    def added_tokens(self) -> dict[str, int]:
        """The recipe's added tokens with their ids."""
        return self.record.added_tokens

    @property
    def base_location(self) -> str | None:
        """Folder or hub id of the base."""
        return self.record.base.name_or_path if self.record.base else None

    @property
    def base_revision(self) -> str | None:
        """Revision of the base on the hub."""
        return self.settings.get("revision")

    @property
    def base_fingerprint(self) -> str | None:
        """Fingerprint of the base's weights."""
        return self.record.base.fingerprint if self.record.base else None

    @property
    def base_made_from(self) -> MergeSources | None:
        """What the base was made from, if it was a merged checkpoint."""
        return self.record.base.made_from if self.record.base else None

    @property
    def initial_digest(self) -> str | None:
        """SHA-256 of the adapter that training started from, and whose change is part of this one's."""
        return self.record.adapter.sha256 if self.record.adapter else None

    @property
    def layout_recorded(self) -> bool:
        """Whether the record names the order of the experts' factors; it can only be EXPERT_LAYOUT."""
        return self.record.layout is not None and self.record.layout.expert_lora is not None

    @property
    def expert_major(self) -> bool | None:
        """Whether columns of a stack's `lora_B` go by expert, then rank, as the settings say; None: they do not."""
        return DECLARED_ORDERS.get(str(self.settings.get("lora_B_layout")))

    @property
    def by_unsloth(self) -> bool:
        """Whether Unsloth wrote the settings."""
        mapping = self.settings.get("auto_mapping")
        return isinstance(mapping, dict) and bool(mapping.get("unsloth_fixed"))

    @property
    def has_biases(self) -> bool:
        """Whether correction biases that training moved lie beside it."""
        return (self.folder / BIAS_FILE).is_file()

    def digest(self) -> str:
        """SHA-256 of its weights."""
        return adapter_digest(self.folder)

    def without_effect(self) -> list[str]:
        """Paths of the targets whose B is zero throughout, as it is before training. Reads every B."""
        return [path for path, pair in self.pairs.items() if not read_tensor(pair.b).any()]

    def trains_whole(self, name: str) -> bool:
        """Whether the settings name the module of a whole tensor as one that was trained so."""
        path = name.removesuffix(".weight")
        return any(f".{path}".endswith(f".{module}") for module in self.settings.get("modules_to_save") or [])

    def rank(self, name: str) -> int:
        """`r` of the module or parameter called `name`, by PEFT's own matching of `rank_pattern`."""
        return int(self._by_pattern("rank_pattern", name, "r"))

    def scale(self, name: str) -> float:
        """What B A is multiplied by: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA."""
        r = self.rank(name)
        alpha = float(self._by_pattern("alpha_pattern", name, "lora_alpha"))
        return alpha / math.sqrt(r) if self.settings.get("use_rslora") else alpha / r

    def tokens_of(self, path: str) -> tuple[int, ...] | None:
        """The tokens whose rows of the module at `path` the adapter holds; None where the settings do not say."""
        return next((tokens for name, tokens in self.tokens.items() if f".{path}".endswith(f".{name}")), None)

    def path_of(self, name: str) -> str | None:
        """The path of the module that the settings call `name`, of whose rows the adapter holds some."""
        return next((path for path in self.rows if f".{path}".endswith(f".{name}")), None)

    def _by_pattern(self, patterns: str, name: str, default: str) -> Any:
        get_pattern_key = private("peft.utils.other:get_pattern_key")

        values: dict[str, Any] = self.settings.get(patterns) or {}
        return values.get(get_pattern_key(list(values), name), self.settings[default])


def read_adapter(folder: Path, layout: str | None = None) -> Adapter:
    """The adapter in `folder`, its experts' factors in the order that `layout` names, if any.

    Raises WeightsError for pickles, other PEFT methods, and factors without a partner.
    """
    folder = Path(folder)
    _require_files(folder)
    verify_sums(folder)
    _check_checkpoint(folder)
    settings = read_json(folder / CONFIG_FILE)
    _check_types(settings, folder / CONFIG_FILE)
    record = read_record(folder)
    _require_plain_lora(folder / CONFIG_FILE, settings)
    _check_record(record, folder)
    _check_recorded_values(record, settings, folder)
    contents = read_contents(folder / WEIGHTS_FILE, _modules_to_save(folder / CONFIG_FILE, settings))
    return Adapter(
        folder=folder,
        settings=settings,
        pairs=contents.pairs,
        rows=contents.rows,
        whole=contents.whole,
        spare=contents.spare,
        tokens=_tokens(folder / CONFIG_FILE, settings.get("trainable_token_indices")),
        record=record,
        asked_layout=layout,
    )


def _require_files(folder: Path) -> None:
    if not (folder / CONFIG_FILE).is_file():
        do = "give the folder that the run wrote (runs/<name>/adapter)"
        raise WeightsError(Problem(str(folder), f"is not an adapter folder: it has no {CONFIG_FILE}", do))
    if (folder / WEIGHTS_FILE).is_file():
        return
    if pickles := pickles_in(folder):
        do = "save it again as safetensors: pickle files can run code and are never opened here"
        raise WeightsError(Problem(str(folder), "the adapter is in pickle format", do, got=", ".join(pickles[:3])))
    raise WeightsError(Problem(str(folder), f"has no {WEIGHTS_FILE}", "give the folder that the run wrote"))


def _check_checkpoint(folder: Path) -> None:
    """A checkpoint of a run is an adapter as well if it is whole, and of this version of the program.

    Earlier ones, and those that TRL writes by itself, do not hold the router biases that training moved.
    """
    if (folder / TRAINING_FILES[0]).is_file() and not (folder / SUMS_FILE).is_file():
        what = f"is a checkpoint of a run without its {SUMS_FILE}, and may be damaged"
        raise WeightsError(Problem(str(folder), what, "name another checkpoint of the run, or copy this one again"))
    of_a_trainer = all((folder / name).is_file() for name in _TRAINER_FILES) and not (folder / BIAS_FILE).is_file()
    if of_a_trainer and read_json(folder / _TRAINER_FILES[1]).get("bias"):
        do = f"merge the finished adapter, {folder.parent / 'adapter'}, or let the run go on to its end"
        what = "is a state of training, and its moved router biases are not among the factors"
        raise WeightsError(Problem(str(folder), what, do))


def _check_types(settings: Mapping[str, Any], file: Path) -> None:
    """Raise WeightsError for every setting of a type that PEFT does not write."""
    problems = [
        wrong_type(f"{file}: {name}", expected, settings[name])
        for name, (expected, types) in _TYPES.items()
        if settings.get(name) is not None and not isinstance(settings[name], types)
    ]
    for name in _NAMES:
        values = settings.get(name)
        if isinstance(values, list) and not all(isinstance(value, str) for value in values):
            problems.append(wrong_type(f"{file}: {name}", "a list of names", values))
    layers = settings.get("layers_to_transform")
    if isinstance(layers, list) and not all(type(layer) is int for layer in layers):
        problems.append(wrong_type(f"{file}: layers_to_transform", "a list of whole numbers", layers))
    for name in ("rank_pattern", "alpha_pattern"):
        values = settings.get(name)
        if isinstance(values, dict) and not all(_is_positive(value) for value in values.values()):
            problems.append(wrong_type(f"{file}: {name}", "positive numbers", values))
    alpha = settings.get("lora_alpha")
    if isinstance(alpha, int | float) and not math.isfinite(alpha):
        problems.append(wrong_type(f"{file}: lora_alpha", "a finite number", alpha))
    if problems:
        raise WeightsError(problems)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _check_record(record: AdapterRecord, folder: Path) -> None:
    """The order of factors must be the known one, and a file that the record names must exist."""
    layout = record.layout.expert_lora if record.layout else None
    if layout not in (None, EXPERT_LAYOUT):
        do = f"the adapter was written by another version; only {EXPERT_LAYOUT} is known"
        raise WeightsError(Problem(str(folder / RECORD_FILE), "unknown order of the experts' factors", do, got=layout))
    if record.router_bias not in (None, "", BIAS_FILE):
        do = f"only {BIAS_FILE} is known; {SAVE_AGAIN}"
        raise WeightsError(Problem(f"{folder / RECORD_FILE}: router_bias", "unknown file", do, got=record.router_bias))
    if record.router_bias and not (folder / record.router_bias).is_file():
        what = "is missing, and the record names it: the correction biases of the routers that training moved"
        raise WeightsError(Problem(str(folder / record.router_bias), what, "copy the whole adapter folder of the run"))


def deciding_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide what the adapter computes, in one order."""
    values = {name: settings.get(name) or None for name in DECIDING_SETTINGS}
    return {name: sorted(value) if isinstance(value, list) else value for name, value in values.items()}


def _check_recorded_values(record: AdapterRecord, settings: Mapping[str, Any], folder: Path) -> None:
    """Raise WeightsError where settings or weights are not those that the run wrote down.

    Weights that the folder's checksums list were compared with these. A record of an earlier version has the recipe
    alone, of which `r`, `lora_alpha` and `use_rslora` are PEFT's own.
    """
    recorded = record.settings
    if recorded is None:
        lora = (record.recipe or {}).get("lora", {})
        recorded = {name: lora[name] or None for name in ("r", "lora_alpha", "use_rslora") if name in lora}
    now = deciding_settings(settings)
    do = "fetch or copy the adapter's folder again, all of its files"
    problems = [
        Problem(
            f"{folder / CONFIG_FILE}: {name}",
            f"differs from {RECORD_FILE}, which was written in training and has {json.dumps(recorded[name])[:80]}",
            do,
            got=json.dumps(now[name])[:80],
        )
        for name in now
        if name in recorded and recorded[name] != now[name]
    ]
    held = {name for name in (WEIGHTS_FILE, BIAS_FILE) if (folder / name).is_file()}
    verified = held <= listed_files(folder)
    if not problems and not verified and record.sha256 not in (None, digest := adapter_digest(folder)):
        what = f"the weights are not those that {RECORD_FILE} was written for"
        problems.append(Problem(str(folder / WEIGHTS_FILE), what, do, got=f"SHA-256 {digest[:12]}"))
    if problems:
        raise WeightsError(problems)


def _require_plain_lora(where: Path, settings: dict[str, Any]) -> None:
    do = "only plain LoRA (W + scale * B A) is merged here"
    problems = []
    if settings.get("peft_type") != "LORA":
        problems.append(Problem(f"{where}: peft_type", "adapter is not LoRA", do, got=str(settings.get("peft_type"))))
    if settings.get("init_lora_weights", True) not in NEUTRAL_INITS:
        got = str(settings["init_lora_weights"])
        what = "this initialisation changes the base weights"
        problems.append(Problem(f"{where}: init_lora_weights", what, do, got=got))
    for name, value in settings.items():
        if name not in NEUTRAL_SETTINGS and value not in (None, False, "none", [], {}):
            problems.append(Problem(f"{where}: {name}", "setting is not supported by the merge", do, json.dumps(value)))
    declared = settings.get("lora_B_layout")
    if declared is not None and declared not in DECLARED_ORDERS:
        where_it_is, do = f"{where}: lora_B_layout", f"only {' and '.join(DECLARED_ORDERS)} are known"
        problems.append(Problem(where_it_is, "unknown order of the experts' factors", do, got=json.dumps(declared)))
    types: dict[str, Callable[[Any], bool]] = {
        "r": lambda value: type(value) is int and value > 0,
        "lora_alpha": lambda value: type(value) in (int, float),
    }
    problems += [
        Problem(f"{where}: {name}", "missing or not a number", "save the adapter again", got=str(settings.get(name)))
        for name, valid in types.items()
        if not valid(settings.get(name))
    ]
    if problems:
        raise WeightsError(problems)


def _modules_to_save(where: Path, settings: dict[str, Any]) -> list[str]:
    """Last parts of the modules that were trained whole."""
    value = settings.get("modules_to_save") or []
    if not isinstance(value, list) or not all(isinstance(name, str) and _MODULE.fullmatch(name) for name in value):
        what = "must be a list of names of modules"
        raise WeightsError(Problem(f"{where}: modules_to_save", what, "save the adapter again", json.dumps(value)))
    return value


def _tokens(where: Path, setting: Any) -> dict[str, tuple[int, ...]]:
    """`trainable_token_indices`: tokens by module, or a list of tokens, which are the embedding's."""
    by_module = {EMBEDDING.removesuffix(".weight"): setting} if isinstance(setting, list) else setting or {}
    for tokens in by_module.values():
        sound = isinstance(tokens, list) and all(type(token) is int and token >= 0 for token in tokens)
        if not sound or len(set(tokens)) != len(tokens):
            what = "must name each token once, by its number"
            do = "save the adapter again"
            raise WeightsError(Problem(f"{where}: trainable_token_indices", what, do, got=json.dumps(tokens)[:80]))
    return {name: tuple(tokens) for name, tokens in by_module.items()}


def adapter_digest(folder: Path) -> str:
    """SHA-256 (hex) of the adapter's weights: its factors and the correction biases beside them."""
    digest = hashlib.sha256()
    for name in (WEIGHTS_FILE, BIAS_FILE):
        if (folder / name).is_file():
            with open_regular(folder / name) as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
