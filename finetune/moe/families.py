"""The table of supported architectures: names of attention, experts and router, in the loaded model and on disk.

The engine, the targets of an adapter, 4-bit loading, the audit, the merge, `finetune families` and the tests all read
it; no other code checks for an architecture by name. Names of the model are as transformers 5 builds it, names
on disk those of published checkpoints (transformers' `conversion_mapping.py` turns one into the other).
"""

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from finetune.errors import Problem, WeightsError
from finetune.recipe.error_messages import closest

Part = Literal["attention", "experts", "router", "mlp", "shared_experts", "other"]

# Parts stored in 4 bits by 4-bit loading. Everything else keeps its type, above all the routers: they decide where
# tokens go, and are small.
QUANTIZED_PARTS: frozenset[Part] = frozenset({"attention", "experts", "mlp", "shared_experts"})


@dataclass(frozen=True)
class ExpertStack:
    """One stacked expert parameter `[E, out, in]` (`[E, in, out]` if transposed) and the on-disk tensors that make it.

    Per-expert checkpoints: `disk_names` are matrices, concatenated along the output axis in this order: Mixtral's
    `gate_up_proj` is `w1` over `w3`. Fused checkpoints: one 3-D tensor that holds the stack as the model does.
    """

    parameter: str
    disk_names: tuple[str, ...]


@dataclass(frozen=True)
class MoeLayout:
    """Names in a decoder layer with experts, relative to it (`model.layers.N.`)."""

    experts_module: str  # module that holds the stacks
    router_module: str  # module that returns (logits [T, E], weights [T, K], chosen experts [T, K])
    stacks: tuple[ExpertStack, ...]
    disk_expert: str  # format string with {name} and, in a per-expert checkpoint, {expert}
    disk_router: str  # tensor [E, H]
    router_weight: str = "weight"  # parameter [E, H] below router_module
    shared: tuple[str, ...] = ()  # linear modules of the experts that see every token; the same names on disk
    transposed: bool = False  # stacks are [E, in, out], in memory and on disk
    biases: bool = False  # experts have biases `<stack>_bias [E, out]`, which are neither quantised nor adapted
    scores: Literal["softmax", "sigmoid"] = "softmax"  # how the router turns logits into scores
    correction_bias: str | None = None  # tensor of E values added to the scores for the choice only (DeepSeek-V3)
    disk_correction_bias: str | None = None  # its name on disk

    @property
    def per_expert(self) -> bool:
        """Whether the checkpoint holds one tensor an expert instead of whole stacks."""
        return "{expert}" in self.disk_expert

    @property
    def router_parameter(self) -> str:
        """The router's weight, below the decoder layer."""
        return f"{self.router_module}.{self.router_weight}"


@dataclass(frozen=True)
class Family:
    """One architecture (`config.model_type`). A name matches a module whose path equals it or ends in `.name`."""

    model_type: str
    attention: tuple[str, ...]  # linear modules; not every checkpoint has all of them
    dense_mlp: tuple[str, ...]  # linear modules of a layer without experts; empty where every layer has experts
    moe: MoeLayout | None
    unquantized: tuple[str, ...] = ()  # other linear modules; they stay in 16 bits
    limits: tuple[str, ...] = ()  # notes for users, as whole phrases
    model_class: str = "AutoModelForCausalLM"  # of transformers
    attn_implementations: tuple[str, ...] = ("sdpa", "eager", "flash_attention_2")
    unpackable: str | None = None  # why packed rows would attend to each other

    @property
    def targets(self) -> tuple[str, ...]:
        """The friendly names that `lora.targets` can hold; a single checkpoint may lack `mlp` or `shared_experts`."""
        mlp = ("mlp",) if self.dense_mlp else ()
        if self.moe is None:
            return ("attention", *mlp)
        return ("attention", "experts", "router", *mlp, *(("shared_experts",) if self.moe.shared else ()))

    def transformers_class(self) -> Any:
        """The class whose `from_pretrained` makes the model."""
        import transformers  # here, so that importing the table is cheap

        return getattr(transformers, self.model_class)

    def part(self, path: str) -> Part:
        """The part that a module or a parameter belongs to, by its path in the loaded model."""
        moe = self.moe
        if moe is not None and _is_within(path, (moe.router_module,)):
            return "router"
        if moe is not None and _is_within(path, (moe.experts_module,)):
            return "experts"
        if moe is not None and _is_within(path, moe.shared):
            return "shared_experts"
        if _is_within(path, self.attention):
            return "attention"
        return "mlp" if _is_within(path, self.dense_mlp) else "other"

    def leaves_unquantized(self, path: str) -> bool:
        """Whether a linear module that is `other` is one that the table knows."""
        return _is_within(path, self.unquantized)


def _is_within(path: str, modules: tuple[str, ...]) -> bool:
    """Whether `path` is one of `modules` or something below it."""
    return any(f".{module}." in f".{path}." for module in modules)


__all__ = [
    "FAMILIES",
    "QUANTIZED_PARTS",
    "REFUSED",
    "WITHOUT_CODE",
    "ExpertStack",
    "Family",
    "MoeLayout",
    "Part",
    "family_of",
]

_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
# Latent attention; small models have one q_proj in place of the pair q_a_proj, q_b_proj.
_LATENT = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_MLP = tuple(f"mlp.{name}" for name in _GATED)
_SHARED_EXPERTS = tuple(f"mlp.shared_experts.{name}" for name in _GATED)
_SHARED_EXPERT = tuple(f"mlp.shared_expert.{name}" for name in _GATED)

_GATE_UP_DOWN = (ExpertStack("gate_up_proj", ("gate_proj", "up_proj")), ExpertStack("down_proj", ("down_proj",)))
_W1_W3_W2 = (ExpertStack("gate_up_proj", ("w1", "w3")), ExpertStack("down_proj", ("w2",)))
_AS_IN_MEMORY = (ExpertStack("gate_up_proj", ("gate_up_proj",)), ExpertStack("down_proj", ("down_proj",)))
_INPUT_OUTPUT = (ExpertStack("gate_up_proj", ("input_linear",)), ExpertStack("down_proj", ("output_linear",)))

# Mixtral's names on disk.
_MIXTRAL = MoeLayout(
    experts_module="mlp.experts",
    router_module="mlp.gate",
    stacks=_W1_W3_W2,
    disk_expert="block_sparse_moe.experts.{expert}.{name}.weight",
    disk_router="block_sparse_moe.gate.weight",
)
_GRANITE = MoeLayout(
    experts_module="block_sparse_moe.experts",
    router_module="block_sparse_moe.router",
    stacks=_INPUT_OUTPUT,
    disk_expert="block_sparse_moe.{name}.weight",
    disk_router="block_sparse_moe.router.layer.weight",
)


def _qwen(
    shared: tuple[str, ...] = (),
    scores: Literal["softmax", "sigmoid"] = "softmax",
    correction_bias: str | None = None,
    disk_correction_bias: str | None = None,
    router_weight: str = "weight",
) -> MoeLayout:
    """Qwen's names, which most architectures use: the same in the model and on disk except for the stacks."""
    return MoeLayout(
        experts_module="mlp.experts",
        router_module="mlp.gate",
        stacks=_GATE_UP_DOWN,
        disk_expert="mlp.experts.{expert}.{name}.weight",
        disk_router=f"mlp.gate.{router_weight}",
        router_weight=router_weight,
        shared=shared,
        scores=scores,
        correction_bias=correction_bias,
        disk_correction_bias=disk_correction_bias or correction_bias,
    )


_DEEPSEEK_V3 = _qwen(_SHARED_EXPERTS, "sigmoid", "mlp.gate.e_score_correction_bias")
_RECURRENT = "its recurrent layers carry their state from one row into the next"
_PUBLISHED_IN_FP8 = "published in FP8: give a bfloat16 copy"

_ALL = (
    Family("llama", _QKVO, _GATED, None),
    Family("mistral", _QKVO, _GATED, None),
    Family("mixtral", _QKVO, (), _MIXTRAL),
    Family("qwen2_moe", _QKVO, _MLP, _qwen(_SHARED_EXPERT), unquantized=("mlp.shared_expert_gate",)),
    Family("qwen3_moe", _QKVO, _MLP, _qwen()),
    Family(
        "qwen3_next",
        (*_QKVO, "linear_attn.in_proj_qkvz", "linear_attn.out_proj"),
        _MLP,
        _qwen(_SHARED_EXPERT),
        unquantized=("mlp.shared_expert_gate", "linear_attn.in_proj_ba"),
        limits=("linear attention is slow without the package flash-linear-attention",),
        unpackable=_RECURRENT,
    ),
    Family("deepseek_v2", _LATENT, _MLP, _qwen(_SHARED_EXPERTS)),
    Family("deepseek_v3", _LATENT, _MLP, _DEEPSEEK_V3, limits=(_PUBLISHED_IN_FP8,)),
    Family("glm4_moe", _QKVO, _MLP, _DEEPSEEK_V3),
    Family("glm4_moe_lite", _LATENT, _MLP, _DEEPSEEK_V3),
    Family("dots1", _QKVO, _MLP, _DEEPSEEK_V3),
    Family(
        "exaone_moe",
        _QKVO,
        _MLP,
        replace(_DEEPSEEK_V3, disk_correction_bias="mlp.e_score_correction_bias"),
    ),
    Family("mimo_v2_flash", _QKVO, _MLP, replace(_DEEPSEEK_V3, shared=()), attn_implementations=("eager",)),
    Family("mellum", _QKVO, (), _qwen()),
    Family("solar_open", _QKVO, (), _DEEPSEEK_V3),
    Family(
        "ernie4_5_moe",
        _QKVO,
        _MLP,
        _qwen(
            _SHARED_EXPERTS,
            correction_bias="mlp.gate.moe_statics.e_score_correction_bias",
            disk_correction_bias="mlp.moe_statics.e_score_correction_bias",
        ),
    ),
    Family(
        "hunyuan_v1_moe",
        _QKVO,
        (),
        _qwen(tuple(f"mlp.shared_mlp.{name}" for name in _GATED), router_weight="wg.weight"),
    ),
    Family("olmoe", _QKVO, (), _qwen()),
    Family("flex_olmo", _QKVO, (), _qwen()),
    Family(
        "mistral4",
        _LATENT,
        _MLP,
        MoeLayout(
            experts_module="mlp.experts",
            router_module="mlp.gate",
            stacks=_AS_IN_MEMORY,
            disk_expert="mlp.experts.{name}",
            disk_router="mlp.gate.weight",
            shared=_SHARED_EXPERTS,
        ),
        limits=("the text model alone, not the multimodal mistral3 around it",),
        model_class="Mistral4ForCausalLM",
    ),
    Family(
        "gpt_oss",
        _QKVO,
        (),
        MoeLayout(
            experts_module="mlp.experts",
            router_module="mlp.router",
            stacks=_AS_IN_MEMORY,
            disk_expert="mlp.experts.{name}",
            disk_router="mlp.router.weight",
            transposed=True,
            biases=True,
        ),
        limits=("published in MXFP4: give a bfloat16 copy",),
        attn_implementations=("eager",),  # its attention sinks
        unpackable="transformers 5.24 does not tell its attention where a row begins",
    ),
    Family(
        "phimoe",
        _QKVO,
        (),
        replace(_MIXTRAL, router_module="mlp.router"),
        limits=("the router samples experts in training (sparsemixer): two runs of one batch differ by the seed",),
    ),
    Family("granitemoe", _QKVO, (), _GRANITE),
    Family(
        "granitemoeshared",
        _QKVO,
        (),
        replace(_GRANITE, shared=("shared_mlp.input_linear", "shared_mlp.output_linear")),
    ),
    Family(
        "jamba",
        _QKVO,
        tuple(f"feed_forward.{name}" for name in _GATED),
        MoeLayout(
            experts_module="feed_forward.experts",
            router_module="feed_forward.router",
            stacks=_GATE_UP_DOWN,
            disk_expert="feed_forward.experts.{expert}.{name}.weight",
            disk_router="feed_forward.router.weight",
        ),
        unquantized=tuple(f"mamba.{name}" for name in ("in_proj", "x_proj", "dt_proj", "out_proj")),
        limits=("mamba layers stay in 16 bits, and are slow without the packages mamba-ssm and causal-conv1d",),
        unpackable=_RECURRENT,
    ),
    Family(
        "minimax",
        (*_QKVO, "self_attn.qkv_proj", "self_attn.output_gate", "self_attn.out_proj"),
        (),
        _MIXTRAL,
        unpackable=_RECURRENT,
    ),
    Family(
        "minimax_m2",
        _QKVO,
        (),
        replace(
            _MIXTRAL,
            scores="sigmoid",
            correction_bias="mlp.e_score_correction_bias",
            disk_correction_bias="block_sparse_moe.e_score_correction_bias",
        ),
        limits=(_PUBLISHED_IN_FP8,),
    ),
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}

_OWN_FORWARD = (
    "transformers runs its experts in the model's own code, not through ExpertsInterface: 4-bit experts and their "
    "adapters would not be reached"
)
_LLAMA4 = f"{_OWN_FORWARD}; every expert runs on every token, weighted before it instead of after"
_ENCODER_DECODER = "an encoder-decoder model; only decoder-only language models are trained here"

REFUSED: dict[str, str] = {
    "dbrx": f"{_OWN_FORWARD}; an expert is a slice of one matrix of two dimensions",
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "jetmoe": f"{_OWN_FORWARD}; its attention is made of experts too",
    "longcat_flash": f"{_OWN_FORWARD}; some of its experts have no weights",
    "nllb-moe": _ENCODER_DECODER,
    "switch_transformers": _ENCODER_DECODER,
}


_NO_CODE = "transformers has no code for it; code that comes with a checkpoint (trust_remote_code) is never run here"

WITHOUT_CODE: dict[str, str] = {
    "arctic": "Snowflake Arctic",
    "bailing_moe": "Ling",
    "bailing_moe_v2": "Ling 2.0",
    "deepseek": "DeepSeekMoE 16B",
    "deepseek_vl_v2": "DeepSeek-VL2, which also reads images",
    "grok-1": "Grok-1",
    "kimi_k2": "Kimi K2",
    "kimi_vl": "Kimi-VL, which also reads images",
    "minicpm": "MiniCPM and MiniCPM-MoE",
    "minimax_m1": "MiniMax-M1",
    "moe_plus_plus": "MoE++",
    "openmoe": "OpenMoE",
    "PanguProMoE": "Pangu Pro MoE",
    "pangu_ultra_moe": "Pangu Ultra MoE",
    "skywork_moe": "Skywork-MoE",
    "xverse": "XVERSE and XVERSE-MoE",
    "yuan": "Yuan 2.0-M32",
}
"""Published models whose `model_type` transformers does not know."""


def family_of(model_type: str, where: str) -> Family:
    """The family of `config.model_type`; `where` (a path) goes into the error for an unsupported one."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    known = f"use one of: {', '.join(sorted(FAMILIES))}"
    if (reason := _why_refused(model_type)) is not None:
        raise WeightsError(Problem(where, f"{model_type} is not supported: {reason}", known))
    close = _misspelt(model_type)
    what = "architecture is not supported: nothing says where its experts and router are, and how they are stored"
    raise WeightsError(Problem(where, what, f"did you mean {close}? {known}" if close else known, got=model_type))


def _why_refused(model_type: str) -> str | None:
    """The reason, None for an architecture of transformers that the table lacks, and for a misspelt name."""
    from transformers import CONFIG_MAPPING  # here, so that importing the table is cheap
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if model_type in REFUSED:
        return REFUSED[model_type]
    if model_type in WITHOUT_CODE:
        return f"{WITHOUT_CODE[model_type]}; {_NO_CODE}"
    if model_type not in CONFIG_MAPPING:
        return None if _misspelt(model_type) else _NO_CODE
    parts = getattr(CONFIG_MAPPING[model_type], "sub_configs", {})
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or parts.keys() & {"vision_config", "audio_config"}:
        return "a model of text with images, video or sound; only models of text alone are trained here"
    return None


def _misspelt(model_type: str) -> str | None:
    """The architecture that was meant. Other digits are another architecture, as is a name of transformers."""
    from transformers import CONFIG_MAPPING

    same_digits = [name for name in FAMILIES if re.findall(r"\d", name) == re.findall(r"\d", model_type)]
    return None if model_type in CONFIG_MAPPING else closest(model_type.lower(), same_digits, cutoff=0.85)


_HEADINGS = ("model_type", "experts on disk", "router", "lora.targets")


def families_table() -> str:
    """Supported architectures, one per line, notes on some of them, and unsupported ones with the reason."""
    mixtures = [family for family in FAMILIES.values() if family.moe is not None]
    dense = [family.model_type for family in FAMILIES.values() if family.moe is None]
    rows = [_HEADINGS, *(_row(family, family.moe) for family in mixtures if family.moe is not None)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(
        [
            *lines,
            "",
            "Of each, model.load_in_4bit stores all experts in 4 bits, and all other targets but the router.",
            f"Dense models on the same path: {', '.join(dense)} (lora.targets: attention, mlp).",
            "",
            "To know",
            *(f"  {family.model_type}: {note}" for family in mixtures for note in _notes(family)),
            "",
            "Refused before anything is loaded",
            *(f"  {name}: {reason}" for name, reason in REFUSED.items()),
            f"  without code in transformers: {', '.join(f'{name} ({model})' for name, model in WITHOUT_CODE.items())}",
            "  models that read images, video or sound as well",
            "",
            "finetune families NAME prints one of them with its chat templates.",
        ]
    )


def family_lines(family: Family) -> list[str]:
    """One architecture: the cells of its row in the table with their headings, and its notes."""
    row = _row(family, family.moe) if family.moe else (family.model_type, "none", "none", ", ".join(family.targets))
    width = max(map(len, _HEADINGS))
    lines = [f"{heading.ljust(width)}  {cell}" for heading, cell in zip(_HEADINGS, row, strict=True)]
    return [*lines, *(f"{'to know'.ljust(width)}  {note}" for note in _notes(family))]


def _row(family: Family, moe: MoeLayout) -> tuple[str, ...]:
    on_disk = "one tensor an expert" if moe.per_expert else "one tensor a layer"
    on_disk += ", transposed" if moe.transposed else ""
    on_disk += ", biases" if moe.biases else ""
    router = moe.scores + (" + correction bias" if moe.correction_bias else "")
    return family.model_type, on_disk, router, ", ".join(family.targets)


def _notes(family: Family) -> list[str]:
    """The limits of one architecture, including those implied by its other fields."""
    notes = list(family.limits)
    if len(family.attn_implementations) == 1:
        notes.append(f"model.attn_implementation must be {family.attn_implementations[0]}")
    if family.unpackable:
        notes.append(f"data.packing must be false: {family.unpackable}")
    return notes
