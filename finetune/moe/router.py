"""Router: capture of its logits, the load-balancing term, statistics of the load.

The term is `E * sum_e f_e P_e` per layer, averaged over layers (Switch Transformer, arXiv 2101.03961, counted as in
transformers: balanced scores `top_k`). `f_e` is the share of the real tokens whose top-k holds expert e, `P_e` the mean
router probability. `f` comes from all micro-batches and ranks of the previous optimizer step (uniform before the first)
and `P` is normalised by the real tokens of the whole step. So the term is a sum over tokens and is the same however a
step's batch is cut; compare global-batch balancing, arXiv 2501.11873. transformers pools all layers before `f * P`:
layers that collapsed onto different experts then score the optimum. Here each layer counts alone.

T tokens, E experts, K experts a token, L layers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from finetune.errors import Problem, WeightsError


@dataclass
class RouterRecord:
    """What the routers did in one forward: per layer logits `[T, E]` (with gradient) and chosen experts `[T, K]`."""

    logits: list[torch.Tensor] = field(default_factory=list)
    indices: list[torch.Tensor] = field(default_factory=list)


def find_routers(model: torch.nn.Module, router_module: str) -> list[torch.nn.Module]:
    """The router of each layer, in order; under an adapter the wrapped router itself."""
    routers = []
    for name, module in model.named_modules():
        if name.endswith(f".{router_module}"):
            get_base_layer = getattr(module, "get_base_layer", None)
            routers.append(module if get_base_layer is None else get_base_layer())
    if not routers:
        raise WeightsError(
            Problem(router_module, "the loaded model has no router of this name", "report this architecture")
        )
    return routers


@contextmanager
def capture(routers: list[torch.nn.Module]) -> Iterator[RouterRecord]:
    """Record the routers' outputs during the block. The recompute of checkpointing runs outside of it."""
    record = RouterRecord()

    def keep(_module: torch.nn.Module, _args: Any, output: tuple[torch.Tensor, ...]) -> None:
        record.logits.append(output[0])
        record.indices.append(output[2])

    handles = [router.register_forward_hook(keep) for router in routers]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def balance_value(frequency_LE: torch.Tensor, probability_LE: torch.Tensor) -> torch.Tensor:
    """`mean_l E * sum_e f_le P_le`: `top_k` when balanced, up to E when one expert takes all."""
    num_experts = frequency_LE.shape[-1]
    return num_experts * (frequency_LE * probability_LE).sum(-1).mean()


def token_statistics(record: RouterRecord, real_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over real tokens: router probabilities `[L, E]` in float32 (with gradient) and choices `[L, E]`."""
    weight_T1 = real_T.to(torch.float32).unsqueeze(-1)
    probability, counts = [], []
    for logits_TE, index_TK in zip(record.logits, record.indices, strict=True):
        probability.append((logits_TE.float().softmax(-1) * weight_T1).sum(0))
        chosen_TE = torch.zeros_like(logits_TE, dtype=torch.float32).scatter_(-1, index_TK, 1.0)
        counts.append((chosen_TE * weight_T1).sum(0))
    return torch.stack(probability), torch.stack(counts)


class StepBalance:
    """The balance term over optimizer steps: frequencies of the last step, statistics of the running one.

    `all_reduce` sums a tensor over all ranks. The state that a resumed run needs is `frequency_LE`.
    """

    def __init__(self, num_layers: int, num_experts: int, top_k: int, device: torch.device) -> None:
        shape = (num_layers, num_experts)
        self.frequency_LE = torch.full(shape, top_k / num_experts, device=device)
        self._probability_LE = torch.zeros(shape, device=device)
        self._count_LE = torch.zeros(shape, device=device)
        self._step_tokens = 1.0

    def begin_step(self, step_tokens: float) -> None:
        """`step_tokens`: real tokens of the whole optimizer step, over all ranks and micro-batches."""
        self._step_tokens = max(step_tokens, 1.0)
        self._probability_LE.zero_()
        self._count_LE.zero_()

    def term(self, record: RouterRecord, real_T: torch.Tensor) -> torch.Tensor:
        """This micro-batch's share of the term; the shares of a step sum up to its value. Scalar, with gradient."""
        probability_LE, count_LE = token_statistics(record, real_T)
        self._probability_LE += probability_LE.detach()
        self._count_LE += count_LE
        return balance_value(self.frequency_LE, probability_LE / self._step_tokens)

    def end_step(self, all_reduce: Any) -> tuple[float, torch.Tensor]:
        """The exact value of the step (its own `f` and `P`) and each expert's share `[L, E]` (rows sum to 1)."""
        total = all_reduce(torch.stack([self._probability_LE, self._count_LE])) / self._step_tokens
        probability_LE, self.frequency_LE = total[0], total[1]
        value = balance_value(self.frequency_LE, probability_LE).item()
        return value, self.frequency_LE / self.frequency_LE.sum(-1, keepdim=True)

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, as plain numbers (JSON)."""
        return {"frequency": self.frequency_LE.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.frequency_LE = torch.tensor(state["frequency"], device=self.frequency_LE.device)


def load_summary(share_LE: torch.Tensor) -> dict[str, float]:
    """Largest load over the mean load (1 = balanced), entropy as a share of its maximum, experts without a token."""
    num_experts = share_LE.shape[-1]
    entropy_L = -(share_LE * share_LE.clamp_min(1e-12).log()).sum(-1)
    return {
        "router/max_load": (share_LE.max(-1).values * num_experts).mean().item(),
        "router/entropy": (entropy_L / torch.tensor(float(num_experts)).log()).mean().item(),
        "router/dead_experts": float((share_LE == 0).sum().item()),
    }
