"""Balance term and z-loss, exact for any split of an optimizer step into micro-batches and ranks, and load figures.

The term is `E * sum_e f_e P_e` per layer, averaged over layers (Switch Transformer, arXiv 2101.03961, counted as in
transformers: balanced scores `top_k`). `f_e` is the share of the real tokens whose top-k holds expert e, `P_e` the mean
router score: the softmax of the logits, or for sigmoid routers `s_e / sum s` (DeepSeek-V3, arXiv 2412.19437, eq. 18).
The z-loss is the mean over tokens and layers of `logsumexp(logits)^2` (ST-MoE, arXiv 2202.08906, eq. 5).

`P` and the z-loss are sums over tokens, normalised by the real tokens of the whole step; `f` has no gradient. The
source of `f` decides whether the term depends on how a step is split into micro-batches and ranks:

- step: from all of the previous optimizer step (uniform before the first). The term is linear in the tokens, so
  value and gradient do not depend on the split; compare global-batch balancing, arXiv 2501.11873.
- micro_batch: from the micro-batch itself, the classic form. The term of a step is the mean of its micro-batches'
  terms, each weighted by its share of the step's real tokens: the strength does not depend on the split, but
  the value does.

Pooled, as transformers counts, `f` and `P` are averaged over layers before they are multiplied: layers that collapsed
onto different experts then score the optimum. Otherwise each layer counts alone.

T tokens, E experts, K experts a token, L layers.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from finetune.moe.router import RouterRecord

Scores = Literal["softmax", "sigmoid"]
AllReduce = Callable[[torch.Tensor], torch.Tensor]
CHOICES_PER_EXPERT = 10
"""Mean choices for an expert in a step, below which one without a token says nothing about the router."""


def balance_value(frequency_LE: torch.Tensor, probability_LE: torch.Tensor, pooled: bool = False) -> torch.Tensor:
    """`mean_l E * sum_e f_le P_le`: `top_k` when balanced, up to E when one expert takes all. Scalar."""
    if pooled:
        frequency_LE, probability_LE = (values_LE.mean(0, keepdim=True) for values_LE in (frequency_LE, probability_LE))
    return frequency_LE.shape[-1] * (frequency_LE * probability_LE).sum(-1).mean()


@dataclass(frozen=True)
class TokenSums:
    """Sums over the real tokens of one forward, per layer, in float32."""

    probability_LE: torch.Tensor  # router scores that sum to 1 for each token; with gradient
    count_LE: torch.Tensor  # tokens whose top-k holds the expert
    z_L: torch.Tensor  # logsumexp(logits)^2; with gradient
    changed_L: torch.Tensor  # tokens whose top-k is not the base router's; 0 if not requested
    finite_L: torch.Tensor  # whether every logit is finite, padding included

    def packed(self) -> torch.Tensor:
        """All sums of a step in one tensor `[L, 2 E + 2]`, without gradient."""
        columns = (self.probability_LE, self.count_LE, self.z_L.unsqueeze(-1), self.changed_L.unsqueeze(-1))
        return torch.cat(columns, -1).detach()


def token_sums(record: RouterRecord, real_T: torch.Tensor, scores: Scores = "softmax") -> TokenSums:
    """Reduce a record to its sums; `real_T` is 0 for padding."""
    weight_T = real_T.to(torch.float32)
    probability, count, z, finite = [], [], [], []
    for logits_TE, index_TK in zip(record.logits, record.indices, strict=True):
        # Checkpointed: the backward keeps the logits, which are in memory anyway, instead of float32 copies.
        sums = checkpoint(_score_sums, logits_TE, weight_T, scores, use_reentrant=False, preserve_rng_state=False)
        probability.append(sums[0])
        z.append(sums[1])
        count.append(_choices(index_TK, logits_TE.shape[-1], weight_T))
        finite.append(torch.isfinite(logits_TE.detach()).all())
    changed = [(changed_T * weight_T).sum() for changed_T in record.changed] or [torch.zeros_like(z_sum) for z_sum in z]
    return TokenSums(*map(torch.stack, (probability, count, z, changed, finite)))


def _score_sums(logits_TE: torch.Tensor, weight_T: torch.Tensor, scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sums over tokens of the normalised scores `[E]` and of `logsumexp^2`, in float32 at least."""
    logits_TE = logits_TE.float() if logits_TE.dtype != torch.float64 else logits_TE
    # s / sum s is the softmax of log s, which does not underflow.
    log_scores_TE = torch.nn.functional.logsigmoid(logits_TE) if scores == "sigmoid" else logits_TE
    probability_E = (log_scores_TE.softmax(-1) * weight_T.unsqueeze(-1)).sum(0)
    return probability_E, (logits_TE.logsumexp(-1).square() * weight_T).sum()


def _choices(index_TK: torch.Tensor, num_experts: int, weight_T: torch.Tensor) -> torch.Tensor:
    chosen_TE = weight_T.new_zeros(index_TK.shape[0], num_experts).scatter_(-1, index_TK, 1.0)
    return (chosen_TE * weight_T.unsqueeze(-1)).sum(0)


@dataclass(frozen=True)
class StepFigures:
    """One finished optimizer step, over all ranks and micro-batches; tensors on the device."""

    value: torch.Tensor  # the balance value of the step's own f and P: `top_k` when balanced
    z: torch.Tensor  # mean of logsumexp^2
    count_LE: torch.Tensor  # real tokens whose top-k held the expert
    changed_L: torch.Tensor  # share of the real tokens whose top-k is not the base router's


class StepBalance:
    """The terms over optimizer steps: frequencies of the previous step, sums of the current one.

    No host sync. A resumed run needs `frequency_LE`.
    """

    def __init__(
        self,
        top_k: list[int],
        num_experts: int,
        device: torch.device,
        balance: Literal["per_layer", "pooled"] = "per_layer",
        scope: Literal["step", "micro_batch"] = "step",
    ) -> None:
        self.pooled, self.own_frequencies = balance == "pooled", scope == "micro_batch"
        uniform_L1 = torch.tensor(top_k, dtype=torch.float32, device=device).unsqueeze(-1) / num_experts
        self.frequency_LE = uniform_L1.repeat(1, num_experts)
        self._sums = torch.zeros(len(top_k), 2 * num_experts + 2, device=device)
        self._total: torch.Tensor | None = None  # the sums over all ranks, once they are asked for
        self._step_tokens = torch.ones((), device=device)

    def begin_step(self, step_tokens: torch.Tensor) -> None:
        """`step_tokens`: real tokens of the whole optimizer step, over all ranks and micro-batches; a scalar."""
        self._step_tokens = step_tokens.to(self._sums).clamp_min(1.0)
        self._sums = torch.zeros_like(self._sums)
        self._total = None

    def terms(self, sums: TokenSums, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This micro-batch's shares of the balance term and of the z-loss, with gradient; `tokens`: its real
        tokens. The shares of a step add up to its value.
        """
        self._sums = self._sums + sums.packed()
        frequency_LE = sums.count_LE / tokens.clamp_min(1.0) if self.own_frequencies else self.frequency_LE
        balance = balance_value(frequency_LE, sums.probability_LE / self._step_tokens, self.pooled)
        return balance, sums.z_L.mean() / self._step_tokens

    def total(self, all_reduce: AllReduce) -> torch.Tensor:
        """The sums over all ranks, `[L, 2 E + 2]`, once all micro-batches are through; reduced once in a step."""
        if self._total is None:
            self._total = all_reduce(self._sums)
        return self._total

    def dead_share(self, all_reduce: AllReduce) -> torch.Tensor:
        """Share of the experts without a token of the step; a layer with few choices counts as having none. Scalar."""
        experts = self.frequency_LE.shape[-1]
        count_LE = self.total(all_reduce)[:, experts : 2 * experts]
        enough_L1 = count_LE.sum(-1, keepdim=True) >= CHOICES_PER_EXPERT * experts
        return ((count_LE == 0) & enough_L1).float().mean()

    def end_step(self, all_reduce: AllReduce, skipped: bool = False) -> StepFigures:
        """Finish the step; `all_reduce` sums over all ranks. `skipped`: the next step uses what this one used."""
        total = self.total(all_reduce)
        experts = self.frequency_LE.shape[-1]
        mean = total / self._step_tokens
        frequency_LE = mean[:, experts : 2 * experts]
        if not skipped:
            self.frequency_LE = frequency_LE
        return StepFigures(
            value=balance_value(frequency_LE, mean[:, :experts], self.pooled),
            z=mean[:, -2].mean(),
            count_LE=total[:, experts : 2 * experts],
            changed_L=mean[:, -1],
        )

    def state_dict(self) -> dict[str, Any]:
        """State for the next step, as plain numbers (JSON)."""
        return {"frequency": self.frequency_LE.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.frequency_LE = torch.tensor(state["frequency"], device=self.frequency_LE.device)


def load_share(count_LE: torch.Tensor) -> torch.Tensor:
    """Each expert's share of its layer's choices, `[L, E]`; rows sum to 1."""
    return count_LE / count_LE.sum(-1, keepdim=True).clamp_min(1.0)


def load_figures(count_LE: torch.Tensor) -> dict[str, torch.Tensor]:
    """Per layer: largest load over the mean load (1 = balanced), entropy as a share of its maximum, and the number of
    experts without a token; each `[L]`, on the device."""
    share_LE = load_share(count_LE)
    experts = share_LE.shape[-1]
    entropy_L = torch.special.entr(share_LE).sum(-1)
    return {
        "max_load": share_LE.max(-1).values * experts,
        "entropy": entropy_L / math.log(max(experts, 2)),
        "dead_experts": (count_LE == 0).sum(-1).to(share_LE),
    }
