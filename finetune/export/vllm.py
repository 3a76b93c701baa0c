"""Export an adapter for vLLM's LoRA: factors of each expert, with one rank and one scale.

vLLM stacks `experts.N.w1`, `.w2` and `.w3` itself and needs all three of every expert: untrained ones become zeros, and
`w1` and `w3`, the halves of one stack, get the same A. For models whose checkpoints hold whole stacks (GPT-OSS) it
reads PEFT's own form. The supported architectures and modules were read from vLLM 0.32; the tests load exports in vLLM
where it is installed. E experts, r LoRA rank, R the rank of the folder, O outputs, I inputs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finetune.adapters.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from finetune.adapters.deltas import Delta, FactorReader, plan
from finetune.adapters.targets import LAYER, Stack, base_layout
from finetune.adapters.tensors import PREFIX
from finetune.checkpoint import CheckpointReader, CheckpointWriter, TensorSpec
from finetune.checkpoint.reader import SINGLE_FILE, TORCH_DTYPES
from finetune.errors import Problem, WeightsError
from finetune.files import write_json
from finetune.moe.families import Family, Part

VERSION = "0.32"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's --max-lora-rank."""
MERGE = "merge it with `finetune merge` and serve the merged model"

_PARTS: tuple[Part, ...] = ("attention", "experts", "router", "mlp", "shared_experts")
_LATENT = {"kv_b_proj": "vLLM folds it into other matrices when it loads the model, and decodes without its adapter"}
_RECURRENT = {"linear_attn": "vLLM does not wrap the layers of linear attention"}
_ONE_MATRIX = {"shared_mlp": "vLLM does not wrap this matrix, which holds two in one"}


@dataclass(frozen=True)
class Served:
    """How vLLM names what it serves of one architecture; None: as the published checkpoints name it."""

    expert: str | None = None  # format string with {expert} and {name}
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of a stack's matrices, by parameter
    router: str | None = None
    stacked: bool = False  # reads PEFT's factors of whole stacks
    head: bool = False  # wraps lm_head
    without: Mapping[str, str] = field(default_factory=dict)  # modules that are not wrapped, and why

    def refused(self, path: str, part: str) -> str | None:
        """Why factors of the module at `path` cannot be served; None where they can."""
        for name, reason in self.without.items():
            if f".{name}." in f".{path}.":
                return reason
        if part in _PARTS or (self.head and path == "lm_head"):
            return None
        return f"not among what vLLM {VERSION} is known to wrap"


_GRANITE = Served(
    expert="block_sparse_moe.experts.{expert}.{name}",
    names={"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
    router="block_sparse_moe.gate",
    head=True,
    without=_ONE_MATRIX,
)
SERVED: dict[str, Served] = {
    "llama": Served(head=True),
    "mistral": Served(head=True),
    "mixtral": Served(head=True),
    "qwen2_moe": Served(),
    "qwen3_moe": Served(head=True),
    "qwen3_next": Served(without=_RECURRENT),
    "deepseek_v2": Served(without=_LATENT),
    "deepseek_v3": Served(without=_LATENT),
    "glm4_moe": Served(),
    "glm4_moe_lite": Served(without=_LATENT),
    "ernie4_5_moe": Served(),
    "exaone_moe": Served(head=True),
    "olmoe": Served(),
    "jamba": Served(head=True),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "gpt_oss": Served(stacked=True),
    "minimax_m2": Served(),
}


def served(family: Family, where: str) -> Served:
    """The rules for one architecture; WeightsError for one whose adapters vLLM is not known to serve."""
    if family.model_type in SERVED:
        return SERVED[family.model_type]
    what = f"vLLM {VERSION} has no code of its own for {family.model_type}, and is not known to serve its adapters"
    raise WeightsError(Problem(where, what, MERGE))


@dataclass(frozen=True)
class Pair:
    """The factors of module `name`: rows `start:stop` of one expert's B and its whole A; zeros without a delta."""

    name: str
    delta: Delta | None
    expert: int
    start: int
    stop: int
    inputs: int
    experts: int = 1  # of a stack that is written as one


@dataclass(frozen=True)
class LoraFolder:
    """What is written, and the one rank and scale for all of it. `folded`: the scales of the adapter go into B."""

    pairs: tuple[Pair, ...]
    r: int
    scale: float
    folded: bool
    parameters: tuple[str, ...]  # PEFT's `target_parameters`, where stacks are written whole

    @property
    def max_lora_rank(self) -> int:
        """The least `--max-lora-rank` of vLLM that takes it."""
        return next(rank for rank in RANKS if rank >= self.r)

    def settings(self, adapter: Adapter) -> dict[str, Any]:
        """`adapter_config.json`; without patterns, which some readers pass over."""
        alpha = self.scale * self.r
        names = [pair.name for pair in self.pairs if pair.experts == 1]
        modules = {
            name.rpartition(".")[2]
            for name in names
            if not any(f"{name}.weight".endswith(f".{parameter}") for parameter in self.parameters)
        }
        changes: dict[str, Any] = {
            "r": self.r,
            "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
            "rank_pattern": {},
            "alpha_pattern": {},
            "use_rslora": False,
            "lora_dropout": 0.0,  # PEFT takes no other for experts, not even to infer
            "target_modules": sorted(modules),
            "target_parameters": sorted(self.parameters) or None,
            "exclude_modules": None,
        }
        return {**adapter.settings, **changes}

    def dtype(self, pair: Pair) -> str:
        """The adapter's own; fp32 where the scale is multiplied in, or where A and B differ."""
        if pair.delta is None or self.folded or pair.delta.pair.a.dtype != pair.delta.pair.b.dtype:
            return "F32"
        return pair.delta.pair.b.dtype


def prepare(adapter: Adapter, base: CheckpointReader, family: Family) -> LoraFolder:
    """What the folder will hold, from headers. Raises WeightsError (all problems at once) for what cannot be served."""
    rules = served(family, str(adapter.folder))
    _check_contents(adapter)
    deltas = plan(base, adapter, family)
    by_path = {delta.path: delta for of_key in deltas.values() for delta in of_key}
    of_stack = {
        stack.name: {delta.path: delta for key in _keys(stack) for delta in deltas.get(key, [])}
        for stack in base_layout(base, family).stacks
    }
    _refuse(adapter, by_path, rules, family)
    trained = {stack.module for stack in base_layout(base, family).stacks if of_stack[stack.name]}
    stacks = tuple(stack for stack in base_layout(base, family).stacks if stack.module in trained)
    in_stacks = {path for found in of_stack.values() for path in found}
    pairs = [_linear(delta, family, rules) for path, delta in by_path.items() if path not in in_stacks]
    for stack in stacks:
        pairs += _of_stack(stack, of_stack[stack.name], base, family, rules)
    ranks = {_rank(delta) for delta in by_path.values()}
    scales = {delta.scale for delta in by_path.values()}
    folded = len(ranks) > 1 or len(scales) > 1
    return LoraFolder(
        pairs=tuple(pairs),
        r=max(ranks),
        scale=1.0 if folded else scales.pop(),
        folded=folded,
        parameters=_parameters(stacks, by_path, family) if rules.stacked else (),
    )


def _parameters(stacks: Sequence[Stack], by_path: Mapping[str, Delta], family: Family) -> tuple[str, ...]:
    """PEFT's `target_parameters` for stacks that are written whole, and for the router, which is no linear module."""
    assert family.moe is not None
    routers = {family.moe.router_parameter} if any(delta.part == "router" for delta in by_path.values()) else set()
    return (*(f"{family.moe.experts_module}.{name}" for name in {s.parameter for s in stacks}), *routers)


def _rank(delta: Delta) -> int:
    return delta.pair.a.shape[0] // delta.experts


def _keys(stack: Stack) -> Iterator[str]:
    return (key for keys in stack.keys for key in keys)


def _check_contents(adapter: Adapter) -> None:
    """What is no factor at all."""
    where, problems = str(adapter.folder), []
    if adapter.whole:
        got = ", ".join(sorted(adapter.whole)[:3])
        problems.append(Problem(where, "vLLM cannot serve modules that were trained whole", MERGE, got))
    if adapter.rows:
        got = ", ".join(sorted(adapter.rows))
        problems.append(Problem(where, "vLLM cannot serve rows of added tokens from an adapter", MERGE, got))
    if adapter.has_biases:
        problems.append(Problem(where, "vLLM cannot serve correction biases of routers from an adapter", MERGE))
    if problems:
        raise WeightsError(problems)


def _refuse(adapter: Adapter, by_path: Mapping[str, Delta], rules: Served, family: Family) -> None:
    where, problems = str(adapter.folder), []
    if (largest := max(map(_rank, by_path.values()))) > RANKS[-1]:
        problems.append(Problem(where, f"vLLM serves ranks up to {RANKS[-1]}", MERGE, str(largest)))
    on_disk = family.moe is not None and family.moe.transposed
    if swapped := sorted(path for path, delta in by_path.items() if delta.experts > 1 and delta.transposed != on_disk):
        what = "the experts' factors were saved by PEFT 0.17 or 0.18, which swapped inputs and outputs"
        problems.append(Problem(where, what, MERGE, got=swapped[0]))
    reasons: dict[str, str] = {}
    for path, delta in sorted(by_path.items()):
        if reason := rules.refused(path, delta.part):
            reasons.setdefault(reason, path)
    problems += [
        Problem(where, f"vLLM cannot serve factors of {path}: {reason}", MERGE) for reason, path in reasons.items()
    ]
    if problems:
        raise WeightsError(problems)


def _linear(delta: Delta, family: Family, rules: Served) -> Pair:
    """A module with one matrix. Routers have another name on disk, and in vLLM, than in the loaded model."""
    layer, moe, name = LAYER.match(delta.path), family.moe, delta.path
    if layer and moe and delta.part == "router":
        name = layer[0] + (rules.router or moe.disk_router.removesuffix(".weight"))
    return Pair(name, delta, 0, 0, delta.pair.b.shape[0], delta.pair.a.shape[1])


def _of_stack(
    stack: Stack, deltas_by_path: Mapping[str, Delta], base: CheckpointReader, family: Family, rules: Served
) -> list[Pair]:
    """All pairs of one stack of experts; `deltas_by_path` holds one delta of the whole stack or one an expert."""
    layer, moe = LAYER.match(stack.module), family.moe
    assert layer is not None
    assert moe is not None
    inputs, outputs = _sizes(stack, base, moe.transposed)
    whole = next((delta for delta in deltas_by_path.values() if delta.experts > 1), None)
    if rules.stacked:
        number = [known.parameter for known in moe.stacks].index(stack.parameter)
        # As PEFT nests them: the last stack is outermost.
        name = stack.module + ".base_layer" * (len(moe.stacks) - 1 - number)
        return [Pair(name, whole, 0, 0, outputs, inputs, stack.experts)]
    disk = next(known.disk_names for known in moe.stacks if known.parameter == stack.parameter)
    names, form = rules.names.get(stack.parameter, disk), rules.expert or moe.disk_expert.removesuffix(".weight")
    rows = outputs // len(names)
    pairs = []
    for e in range(stack.experts):
        for n, matrix in enumerate(names):
            name = layer[0] + form.format(expert=e, name=matrix)
            if whole is None:  # as transformers 4 has them: a module for each expert
                pairs.append(
                    Pair(name, deltas_by_path.get(stack.modules[e][n]) if deltas_by_path else None, 0, 0, rows, inputs)
                )
            else:
                pairs.append(Pair(name, whole, e, n * rows, (n + 1) * rows, inputs))
    return pairs


def _sizes(stack: Stack, base: CheckpointReader, transposed: bool) -> tuple[int, int]:
    """Inputs and outputs of one expert of the whole stack."""
    shapes = [base.info(key).shape for key in stack.keys[0]]
    rows, columns = sum(int(shape[-2]) for shape in shapes), int(shapes[0][-1])
    return (rows, columns) if transposed else (columns, rows)


def write(folder: Path, adapter: Adapter, lora: LoraFolder) -> None:
    """Weights and settings, one stack's factors in memory at a time."""
    specs = [spec for pair in lora.pairs for spec in _specs(pair, lora)]
    reader = FactorReader()
    with CheckpointWriter(folder, specs, max_shard_bytes=sum(spec.nbytes for spec in specs)) as writer:
        for pair in lora.pairs:
            dtype = TORCH_DTYPES[lora.dtype(pair)]
            for spec, factor in zip(_specs(pair, lora), _factors(pair, lora, reader), strict=True):
                writer.write(spec.key, factor.to(dtype).contiguous())
    (folder / SINGLE_FILE).rename(folder / WEIGHTS_FILE)
    write_json(folder / CONFIG_FILE, lora.settings(adapter))


def _specs(pair: Pair, lora: LoraFolder) -> Sequence[TensorSpec]:
    rank, key, dtype = lora.r * pair.experts, f"{PREFIX}{pair.name}", lora.dtype(pair)
    return (
        TensorSpec(f"{key}.lora_A.weight", dtype, (rank, pair.inputs)),
        TensorSpec(f"{key}.lora_B.weight", dtype, (pair.stop - pair.start, rank)),
    )


def _factors(pair: Pair, lora: LoraFolder, reader: FactorReader) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as they are written; zeros make up for a lower rank."""
    outputs, delta = pair.stop - pair.start, pair.delta
    if delta is None:
        return torch.zeros(lora.r * pair.experts, pair.inputs), torch.zeros(outputs, lora.r * pair.experts)
    scale = delta.scale if lora.folded else 1.0
    missing = lora.r - _rank(delta)
    if pair.experts == 1:
        A_rI = reader.a(delta.pair, delta.experts, pair.expert)
        B_Or = reader.b(delta.pair, delta.experts, pair.expert, pair.start, pair.stop)
        return _padded(A_rI, 0, missing), _padded(B_Or * scale, 1, missing)
    experts = range(pair.experts)
    A_ErI = torch.stack([reader.a(delta.pair, pair.experts, e) for e in experts])
    B_EOr = torch.stack([reader.b(delta.pair, pair.experts, e, 0, outputs) for e in experts]) * scale
    A_ERI, B_EOR = _padded(A_ErI, 1, missing), _padded(B_EOr, 2, missing)
    return A_ERI.flatten(0, 1), B_EOR.permute(1, 2, 0).flatten(1)


def _padded(factor: torch.Tensor, axis: int, missing: int) -> torch.Tensor:
    shape = list(factor.shape)
    shape[axis] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim=axis) if missing else factor
