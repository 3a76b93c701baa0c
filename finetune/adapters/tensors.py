"""Classify the tensors of a PEFT adapter file: LoRA factors, rows of single tokens, or whole tensors of the base."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.checkpoint.reader import TensorInfo, read_header, read_tensor
from finetune.errors import Problem, WeightsError

PREFIX = "base_model.model."
# By their names in the file, and what each is of B A. An embedding's factors are those of its transposed matrix.
FACTORS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"}
# Where training also made the vocabulary longer, PEFT saves a module that was trained whole once more, and the one that
# it stands in front of.
AGAIN, BEFORE = "modules_to_save.weight", "original_module.weight"
ROWS = ".token_adapter.trainable_tokens_delta"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FLOATS = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class FactorPair:
    """`lora_A` [rows, in] and `lora_B` [out, rows] of one wrapped module; rows are r, or E*r for a stack of experts.

    Of an `embedding` [V, H] they are [r, V] and [H, r].
    """

    a: TensorInfo
    b: TensorInfo
    expert_major: bool = False  # columns of a stack's `lora_B` by expert, then rank, instead of by rank, then expert
    embedding: bool = False


@dataclass(frozen=True)
class Contents:
    """The tensors of an adapter file by the module they belong to; `whole` by the name of the base's tensor.

    `spare`: tensors that say nothing that others do not say.
    """

    pairs: dict[str, FactorPair]
    rows: dict[str, TensorInfo]
    whole: dict[str, TensorInfo]
    spare: tuple[str, ...]


def read_contents(file: Path, modules_to_save: Collection[str]) -> Contents:
    """Sort the tensors of `file`. `modules_to_save`: last parts of the modules that were trained whole.

    PEFT also saves embedding and head as they were, where they have factors or more rows than the base.
    Raises WeightsError, all problems at once, for any other tensor and for a factor without a partner.
    """
    factors: dict[str, dict[str, TensorInfo]] = {}
    rows: dict[str, TensorInfo] = {}
    whole: dict[str, TensorInfo] = {}
    spare: dict[str, TensorInfo] = {}
    problems: list[Problem] = []
    for key, info in read_header(file).items():
        path, suffix = _split(key)
        if not key.startswith(PREFIX):
            suffix = ""
        if suffix == ROWS:
            rows[path] = info
        elif suffix in FACTORS:
            factors.setdefault(path, {})[suffix] = info
        elif suffix == "weight" and _is_whole(path, modules_to_save):
            whole[f"{path}.weight"] = info
        elif suffix in (AGAIN, BEFORE) and _is_whole(path, modules_to_save):
            spare[key] = info
        else:
            do = f"only {PREFIX}<module>.lora_A.weight and .lora_B.weight can be merged"
            problems.append(Problem(str(file), "tensor is not a LoRA factor", do, got=key))
            continue
        if info.dtype not in FLOATS or len(info.shape) != 2:
            what = "rows are not" if suffix == ROWS else "factor is not" if suffix in FACTORS else "tensor is not"
            got = f"{info.dtype}{list(info.shape)}"
            problems.append(Problem(f"{file}: {key}", f"{what} a floating-point matrix", "save it again", got))
    problems += _partners(file, factors) + _not_again(file, whole, spare)
    if not factors and not problems:
        problems.append(Problem(str(file), "holds no LoRA tensors", "save the adapter again"))
    problems += [
        Problem(str(file), f"has no tensors of {name}, which its settings name", "save the adapter again")
        for name in modules_to_save
        if not any(f".{key}".endswith(f".{name}.weight") for key in whole)
    ]
    if problems:
        raise WeightsError(problems)
    return Contents({path: _pair(pair) for path, pair in factors.items()}, rows, whole, tuple(spare))


def _split(key: str) -> tuple[str, str]:
    """The module that a tensor belongs to, and what it is of it."""
    name = key.removeprefix(PREFIX)
    for suffix in (ROWS, *FACTORS, AGAIN, BEFORE):
        if name.endswith(suffix):
            return name.removesuffix(suffix).removesuffix("."), suffix
    module, _, last = name.rpartition(".")
    return module.removesuffix(".base_layer"), last


def _is_whole(path: str, modules_to_save: Collection[str]) -> bool:
    saved = any(f".{path}".endswith(f".{name}") for name in modules_to_save)
    return saved or f"{path}.weight" in (EMBEDDING, HEAD)


def _not_again(file: Path, whole: Mapping[str, TensorInfo], spare: Mapping[str, TensorInfo]) -> list[Problem]:
    """Tensors that should be another one once more, and are not."""
    problems = []
    for key, info in spare.items():
        path, suffix = _split(key)
        one = whole.get(f"{path}.weight")
        if one is None or (suffix == AGAIN and not torch.equal(read_tensor(one), read_tensor(info))):
            what, do = f"differs from {PREFIX}{path}.weight, which is the same module", "save the adapter again"
            problems.append(Problem(f"{file}: {key}", what, do))
    return problems


def _partners(file: Path, factors: Mapping[str, Mapping[str, TensorInfo]]) -> list[Problem]:
    """Factors whose other one is not there."""
    problems = []
    for path, infos in factors.items():
        embedding = any("embedding" in name for name in infos)
        wanted = {name for name in FACTORS if ("embedding" in name) == embedding}
        for missing in sorted(wanted - set(infos)):
            do = "the file is incomplete: save the adapter again"
            name = missing.removesuffix(".weight")
            got = f"only {next(iter(infos)).removesuffix('.weight')}"
            problems.append(Problem(str(file), f"{path} has no {name}", do, got))
    return problems


def _pair(infos: Mapping[str, TensorInfo]) -> FactorPair:
    by_factor = {FACTORS[name]: info for name, info in infos.items()}
    return FactorPair(by_factor["A"], by_factor["B"], embedding=any("embedding" in name for name in infos))
