"""What vLLM serves of an adapter, by architecture: read from vLLM 0.32, and loaded there where the tests find it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from finetune.errors import Problem, WeightsError
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
