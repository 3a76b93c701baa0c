"""The shapes that the engine is measured at, and the skewed routing that they are measured with.

T tokens, K experts a token, E experts, H hidden, I intermediate, r LoRA rank.
"""

from dataclasses import asdict, dataclass

import torch

SKEW = 0.5  # exponent s of the popularity p_e ~ rank_e^-s that experts are drawn with (0 is balanced)


@dataclass(frozen=True)
class Shape:
    """One experts module and the tokens of one step."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    tokens: int
    rank: int

    @property
    def rows(self) -> int:
        """Mean number of routed rows an expert."""
        return self.tokens * self.top_k // self.experts

    @property
    def label(self) -> str:
        """`H256 I512 E8 k2 T512 r8`."""
        names = ("H", "I", "E", "k", "T", "r")
        return " ".join(f"{name}{value}" for name, value in zip(names, asdict(self).values(), strict=True))


CPU_SHAPES = (
    Shape(256, 512, 8, 2, 512, 8),  # 128 rows an expert
    Shape(512, 1024, 8, 2, 256, 8),  # 64
    Shape(256, 128, 64, 8, 512, 8),  # 64, many small experts
    Shape(512, 1024, 8, 2, 1024, 8),  # 256
    Shape(512, 1024, 8, 2, 2048, 8),  # 512
)
# OLMoE's 64 experts at a quarter of its widths: stacks that no cache holds, as at full size. Too slow for a test.
QUARTER_OLMOE = Shape(512, 256, 64, 8, 512, 8)
# Mixtral-8x7B's experts; the tokens of a step are set per arm.
MIXTRAL = Shape(4096, 14336, 8, 2, 4096, 16)


@dataclass(frozen=True)
class Routing:
    """Choices and weights `[T, K]` of one step, and how uneven they are."""

    index_TK: torch.Tensor
    weight_TK: torch.Tensor
    skew: float  # rows of the most chosen expert / mean


def draw_routing(shape: Shape, seed: int = 0) -> Routing:
    """Experts drawn without replacement with Zipf-like popularity; weights sum to 1 for each token.

    Uneven as routers are: at s = 0.5 the busiest of 8 experts (top 2) gets 1.7 times the mean, of 64 (top 8) 3.8 times.
    """
    generator = torch.Generator().manual_seed(seed)
    rank_E = torch.randperm(shape.experts, generator=generator) + 1
    uniform_TE = torch.rand(shape.tokens, shape.experts, generator=generator, dtype=torch.float64)
    gumbel_TE = -(-uniform_TE.clamp_min(1e-12).log()).log()
    scores_TK, index_TK = (gumbel_TE - SKEW * rank_E.double().log()).topk(shape.top_k)  # Gumbel top-k
    load_E = torch.bincount(index_TK.reshape(-1), minlength=shape.experts)
    return Routing(index_TK, scores_TK.softmax(-1).float(), float(load_E.max() / load_E.double().mean()))
