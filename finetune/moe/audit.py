"""The audit: how parameters are stored, adapted and trained, and where that differs from the recipe.

It counts the parameters in memory, never what a configuration says.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from bitsandbytes.nn import Params4bit
from peft.tuners.lora.layer import LoraLayer, ParamWrapper

from finetune.errors import Problem, RunError
from finetune.moe.families import QUANTIZED_PARTS, Family
from finetune.moe.nf4 import Nf4Stack
from finetune.moe.sharding import BYTES, flat_layout, local
from finetune.recipe import LoraSettings, Recipe
from finetune.upstream import clean_name

PARTS = ("attention", "experts", "shared_experts", "mlp", "router", "embeddings", "norms", "head", "other")


@dataclass
class PartAudit:
    """One class of parameters. Sizes without the adapter's own; `trained` counts the adapter's parameters."""

    part: str
    parameters: int = 0
    bytes: int = 0
    local_bytes: int = 0  # of `bytes` those on this process, fewer where the model is sharded
    weights: dict[str, str] = field(default_factory=dict)  # matrix or stack -> format it is stored in
    vectors: Counter[str] = field(default_factory=Counter)  # format -> number of norms and biases
    adaptable: set[str] = field(default_factory=set)  # the weights that `lora.targets` can name
    unknown: list[str] = field(default_factory=list)  # linear modules that the table of architectures does not name
    ranks: dict[str, int] = field(default_factory=dict)  # adapted weight -> LoRA rank
    rows: int = 0  # trained rows of embedding or head: those of added tokens
    trained: int = 0
    base_trained: int = 0  # trained parameters of the base: must stay 0

    @property
    def stored_as(self) -> dict[str, int]:
        """Number of tensors by format."""
        return dict(Counter(self.weights.values()) + self.vectors)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for `audit.json`."""
        return {
            "part": self.part,
            "stored_as": self.stored_as,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "local_bytes": self.local_bytes,
            "adapted": len(self.ranks),
            "adaptable": len(self.adaptable),
            "ranks": sorted(set(self.ranks.values())),
            "rows": self.rows,
            "trained": self.trained,
        }


def audit_model(model: torch.nn.Module, family: Family) -> dict[str, PartAudit]:
    """Count every parameter of a (possibly adapted) model by class."""
    parts = {part: PartAudit(part) for part in PARTS}
    for name, parameter in model.named_parameters():
        layout = flat_layout(model, name)
        clean = clean_name(name if layout is None else name.removesuffix(BYTES))
        part = parts[part_of(clean, family)]
        if _is_lora(name) or _are_rows(name):
            part.trained += parameter.numel() if parameter.requires_grad else 0
            part.rows += len(parameter) if parameter.requires_grad and _are_rows(name) else 0
            continue
        if layout is None:
            shape, (stored_as, count, stored_bytes) = _logical_shape(parameter), storage_of(parameter)
        else:
            shape, stored_as, count, stored_bytes = layout.shape, "nf4", layout.shape.numel(), layout.total
        if _is_weight(clean, shape, family):
            part.weights[clean] = stored_as
        else:
            part.vectors[stored_as] += 1
        part.parameters += count
        part.bytes += stored_bytes
        part.local_bytes += stored_bytes * local(parameter).numel() // max(parameter.numel(), 1)
        part.base_trained += count if parameter.requires_grad else 0
    for name, module in model.named_modules():
        weight = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
        clean = clean_name(f"{name}.{weight}")
        part = parts[part_of(clean, family)]
        if isinstance(module, LoraLayer):
            part.ranks[clean] = next(iter(module.r.values()))
        elif isinstance(module, torch.nn.Linear) and not _is_lora(name) and part.part not in ("router", "head"):
            part.adaptable.add(clean)
            if part.part == "other" and not family.leaves_unquantized(clean):
                part.unknown.append(clean)
    for part in (parts["experts"], parts["router"]):
        part.adaptable = set(part.weights)
    return parts


def _is_weight(name: str, shape: torch.Size, family: Family) -> bool:
    """Whether it is a matrix or stack, not a norm, a bias (of experts too) or a router's correction bias."""
    moe, part = family.moe, family.part(name)
    if moe is not None and part == "router":
        return name.endswith(f".{moe.router_parameter}")
    if moe is not None and part == "experts":
        return name.endswith(tuple(f".{moe.experts_module}.{stack.parameter}" for stack in moe.stacks))
    return len(shape) > 1


def check_audit(parts: dict[str, PartAudit], recipe: Recipe) -> None:
    """Raise RunError with every difference between the counted parameters and the recipe."""
    settings = recipe.model
    added = len(settings.added_tokens)
    if problems := differences(parts, recipe.lora, settings.load_in_4bit, settings.dtype, added):
        raise RunError(problems)


def differences(
    parts: dict[str, PartAudit], lora: LoraSettings, load_in_4bit: bool, dtype: str, added_tokens: int = 0
) -> list[Problem]:
    """Every difference between the loaded model and the recipe."""
    problems = []
    for part in parts.values():
        weight_format = "nf4" if load_in_4bit and part.part in QUANTIZED_PARTS else dtype
        problems += _format_problems(part, weight_format, dtype)
        problems += _adapter_problems(part, lora)
        problems += _row_problems(part, added_tokens)
        if part.unknown:
            what = "the table of architectures says nothing of a linear module, which would stay in 16 bits"
            problems.append(Problem(f"audit: {part.part}", what, "report this model", got=part.unknown[0]))
        if part.base_trained:
            problems.append(
                Problem(
                    f"audit: {part.part}",
                    "parameters of the base model would be trained",
                    "only adapters train; report this",
                    got=f"{part.base_trained:,}",
                )
            )
    if not any(part.trained for part in parts.values()):
        problems.append(Problem("audit", "nothing would be trained", "check lora.targets"))
    return problems


def _format_problems(part: PartAudit, weight_format: str, dtype: str) -> list[Problem]:
    """Matrices and stacks must be stored as `weight_format`; vectors (norms, biases) stay in `dtype`.

    Routers and vectors may be in float32 under any recipe: some architectures require it, and no precision is lost.
    """
    matrices = {weight_format, "float32"} if part.part == "router" else {weight_format}
    wrong = Counter(stored for stored in part.weights.values() if stored not in matrices)
    wrong += Counter({stored: count for stored, count in part.vectors.items() if stored not in (dtype, "float32")})
    if not wrong:
        return []
    formats = ", ".join(f"{count} tensors in {stored}" for stored, count in sorted(wrong.items()))
    return [
        Problem(
            f"audit: {part.part}",
            f"the recipe asks for {weight_format}",
            "set model.load_in_4bit and model.dtype to what you want stored",
            got=formats,
        )
    ]


def _adapter_problems(part: PartAudit, lora: LoraSettings) -> list[Problem]:
    wanted = _wanted_weights(part, lora)
    adapted = set(part.ranks)
    problems = []
    if adapted != wanted:
        problems.append(
            Problem(
                f"audit: {part.part}",
                f"the recipe adapts {len(wanted)} of {len(part.adaptable)} weights",
                "report this: the adapter is not what lora.targets says",
                got=f"{len(adapted)} adapted; differing: {', '.join(sorted(adapted ^ wanted)[:3])}",
            )
        )
    rank = lora.expert_r or lora.r if part.part == "experts" else lora.r
    wrong = sorted({adapted_rank for adapted_rank in part.ranks.values() if adapted_rank != rank})
    if wrong:
        problems.append(
            Problem(f"audit: {part.part}", f"the recipe says rank {rank}", "report this", got=f"rank {wrong}")
        )
    return problems


def _row_problems(part: PartAudit, added_tokens: int) -> list[Problem]:
    """The embedding, and an untied head, train one row per added token."""
    wanted = added_tokens if part.part in ("embeddings", "head") and part.parameters else 0
    if part.rows == wanted:
        return []
    what = f"the recipe adds {added_tokens} tokens, so {wanted} rows are to be trained"
    return [Problem(f"audit: {part.part}", what, "report this", got=f"{part.rows} rows")]


def _wanted_weights(part: PartAudit, lora: LoraSettings) -> set[str]:
    """The weights of one class that `lora.targets` names."""
    if part.part in lora.targets:
        return part.adaptable
    return {weight for weight in part.adaptable if any(weight.endswith(f".{target}.weight") for target in lora.targets)}


def storage_of(parameter: torch.Tensor) -> tuple[str, int, int]:
    """Format, number of logical values and bytes held (quantisation constants included) of one parameter."""
    data = parameter.data
    if isinstance(data, Nf4Stack):
        return "nf4", data.numel(), data.stored_bytes
    if isinstance(parameter, Params4bit):
        state = parameter.quant_state
        constants = [state.absmax, state.code, state.offset]
        constants += [state.state2.absmax, state.state2.code] if state.nested else []
        stored = sum(tensor.numel() * tensor.element_size() for tensor in [data, *constants] if tensor is not None)
        return state.quant_type, state.shape.numel(), stored
    return str(data.dtype).removeprefix("torch."), data.numel(), data.numel() * data.element_size()


def _logical_shape(parameter: torch.Tensor) -> torch.Size:
    shape: torch.Size = parameter.quant_state.shape if isinstance(parameter, Params4bit) else parameter.shape
    return shape


def _is_lora(name: str) -> bool:
    return ".lora_" in name


def _are_rows(name: str) -> bool:
    """Whether a parameter holds the rows of added tokens, which PEFT keeps separately."""
    return ".trainable_tokens_delta." in name


def part_of(name: str, family: Family) -> str:
    """The class of a cleaned name of a parameter or module."""
    part = family.part(name)
    if part != "other":
        return part
    markers = (("norm", "norms"), ("embed_tokens", "embeddings"), ("lm_head", "head"))
    return next((part for marker, part in markers if marker in name), "other")


def audit_table(parts: dict[str, PartAudit]) -> str:
    """The audit as a text table, one class a line; of a sharded model also what this process holds."""
    sharded = any(part.local_bytes < part.bytes for part in parts.values())
    header = f"{'part':<15}{'stored as':<22}{'parameters':>16}{'MiB':>11}"
    header += f"{'MiB here':>11}" * sharded + f"{'adapted':>12}{'rank':>7}{'trained':>13}"
    lines = [header, "-" * len(header)]
    for part in parts.values():
        if not part.parameters:
            continue
        stored = ", ".join(sorted(part.stored_as))
        adapted = f"{len(part.ranks)} of {len(part.adaptable)}" if part.adaptable else "-"
        adapted = f"{part.rows} rows" if part.rows else adapted
        rank = ",".join(map(str, sorted(set(part.ranks.values())))) or "-"
        lines.append(
            f"{part.part:<15}{stored:<22}{part.parameters:>16,}{part.bytes / 2**20:>11.1f}"
            + f"{part.local_bytes / 2**20:>11.1f}" * sharded
            + f"{adapted:>12}{rank:>7}{part.trained:>13,}"
        )
    total, size, here, trained = (
        sum(getattr(part, name) for part in parts.values())
        for name in ("parameters", "bytes", "local_bytes", "trained")
    )
    shown = f"{size / 2**20:>11.1f}" + f"{here / 2**20:>11.1f}" * sharded
    lines.append(f"{'total':<37}{total:>16,}{shown}{'':>19}{trained:>13,}")
    return "\n".join(lines)
