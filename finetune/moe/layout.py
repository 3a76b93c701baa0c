"""Schema of the table of architectures: names of the parts, in the loaded model and on disk."""

from dataclasses import dataclass
from typing import Any, Literal

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
