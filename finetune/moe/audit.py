"""The audit: what is stored in how many bits, what is adapted, what is trained; and where that differs from the recipe.

Counts what stands in memory, never what a configuration says should stand there.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from bitsandbytes.nn import Params4bit
from peft.tuners.lora.layer import LoraLayer, ParamWrapper

from finetune.errors import Problem
from finetune.moe.families import Family
from finetune.moe.nf4 import Nf4Stack
from finetune.recipe import LoraSettings

PARTS = ("attention", "experts", "mlp", "router", "embeddings", "norms", "head", "other")
QUANTIZED_PARTS = frozenset({"attention", "experts", "mlp"})
ADAPTABLE_PARTS = ("attention", "experts", "mlp", "router")


@dataclass
class PartAudit:
    """One class of parameters. Sizes without the adapter's own; `trained` counts the adapter's parameters."""

    part: str
    parameters: int = 0
    bytes: int = 0
    weights: dict[str, str] = field(default_factory=dict)  # matrix or stack -> format it is stored in
    vectors: Counter[str] = field(default_factory=Counter)  # format -> number of norms and biases
    ranks: dict[str, int] = field(default_factory=dict)  # adapted weight -> LoRA rank
    trained: int = 0
    base_trained: int = 0  # parameters of the base itself that would be trained: must stay 0

    @property
    def stored_as(self) -> dict[str, int]:
        """Number of tensors by format."""
        return dict(Counter(self.weights.values()) + self.vectors)

    @property
    def adaptable(self) -> set[str]:
        """The weights that `lora.targets` can name."""
        return set(self.weights) if self.part in ADAPTABLE_PARTS else set()

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for `audit.json`."""
        return {
            "part": self.part,
            "stored_as": self.stored_as,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "adapted": len(self.ranks),
            "adaptable": len(self.adaptable),
            "ranks": sorted(set(self.ranks.values())),
            "trained": self.trained,
        }


def audit_model(model: torch.nn.Module, family: Family) -> dict[str, PartAudit]:
    """Count every parameter of a (possibly adapted) model by class."""
    parts = {part: PartAudit(part) for part in PARTS}
    for name, parameter in model.named_parameters():
        clean = clean_name(name)
        part = parts[part_of(clean, family)]
        if _is_lora(name):
            part.trained += parameter.numel() if parameter.requires_grad else 0
            continue
        stored_as, count, stored_bytes = storage_of(parameter)
        if len(_logical_shape(parameter)) > 1:
            part.weights[clean] = stored_as
        else:
            part.vectors[stored_as] += 1
        part.parameters += count
        part.bytes += stored_bytes
        part.base_trained += count if parameter.requires_grad else 0
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            weight = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            clean = clean_name(f"{name}.{weight}")
            parts[part_of(clean, family)].ranks[clean] = next(iter(module.r.values()))
    return parts


def differences(parts: dict[str, PartAudit], lora: LoraSettings, load_in_4bit: bool, dtype: str) -> list[Problem]:
    """Every point in which the loaded model is not what the recipe says; empty when it is."""
    problems = []
    for part in parts.values():
        weight_format = "nf4" if load_in_4bit and part.part in QUANTIZED_PARTS else dtype
        problems += _format_problems(part, weight_format, dtype)
        problems += _adapter_problems(part, lora)
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
    """Matrices and stacks must be stored as `weight_format`; vectors (norms, biases) stay in `dtype`."""
    wrong = Counter(stored for stored in part.weights.values() if stored != weight_format)
    wrong += Counter({stored: count for stored, count in part.vectors.items() if stored != dtype})
    if not wrong:
        return []
    found = ", ".join(f"{count} tensors in {stored}" for stored, count in sorted(wrong.items()))
    return [
        Problem(
            f"audit: {part.part}",
            f"the recipe asks for {weight_format}",
            "set model.load_in_4bit and model.dtype to what you want stored",
            got=found,
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
    wrong = sorted({found for found in part.ranks.values() if found != rank})
    if wrong:
        problems.append(
            Problem(f"audit: {part.part}", f"the recipe says rank {rank}", "report this", got=f"rank {wrong}")
        )
    return problems


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


def clean_name(name: str) -> str:
    """A parameter's name without PEFT's and the launcher's wrapping."""
    return re.sub(r"(^|\.)(base_model\.model|base_layer|module)(?=\.)", "", name).lstrip(".")


def _is_lora(name: str) -> bool:
    return ".lora_" in name


def part_of(name: str, family: Family) -> str:
    """The class of a cleaned parameter name."""
    moe = family.moe
    if moe is not None and f".{moe.router_module}." in name:
        return "router"
    if moe is not None and f".{moe.experts_module}." in name:
        return "experts"
    markers = (
        ("norm", "norms"),
        (".self_attn.", "attention"),
        (".mlp.", "mlp"),
        ("embed_tokens", "embeddings"),
        ("lm_head", "head"),
    )
    return next((part for marker, part in markers if marker in name), "other")


def audit_table(parts: dict[str, PartAudit]) -> str:
    """The audit as a text table, one class a line."""
    header = f"{'part':<11}{'stored as':<22}{'parameters':>16}{'MiB':>11}{'adapted':>12}{'rank':>7}{'trained':>13}"
    lines = [header, "-" * len(header)]
    for part in parts.values():
        if not part.parameters:
            continue
        stored = ", ".join(sorted(part.stored_as))
        adapted = f"{len(part.ranks)} of {len(part.adaptable)}" if part.adaptable else "-"
        rank = ",".join(map(str, sorted(set(part.ranks.values())))) or "-"
        lines.append(
            f"{part.part:<11}{stored:<22}{part.parameters:>16,}{part.bytes / 2**20:>11.1f}"
            f"{adapted:>12}{rank:>7}{part.trained:>13,}"
        )
    total, size = sum(p.parameters for p in parts.values()), sum(p.bytes for p in parts.values())
    trained = sum(part.trained for part in parts.values())
    lines.append(f"{'total':<33}{total:>16,}{size / 2**20:>11.1f}{'':>19}{trained:>13,}")
    return "\n".join(lines)
