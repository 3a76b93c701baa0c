"""The losses of direct preference optimisation: the loss of each pair from four log-probabilities.

Each computes what TRL 1.16 computes under the same name (`DPOTrainer._compute_loss`), value and gradient.
B pairs, W tokens of the longest answer; in `2B` the chosen answers come before the rejected ones.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from finetune.recipe import DpoSettings


@dataclass(frozen=True)
class PairLogps:
    """Summed log-probabilities of the answers under policy and reference, and the answers' supervised tokens; `[B]`."""

    chosen_B: torch.Tensor
    rejected_B: torch.Tensor
    ref_chosen_B: torch.Tensor
    ref_rejected_B: torch.Tensor
    chosen_tokens_B: torch.Tensor
    rejected_tokens_B: torch.Tensor

    def log_ratios(self) -> tuple[torch.Tensor, torch.Tensor]:
        """log pi / pi_ref of the chosen and of the rejected answers."""
        return self.chosen_B - self.ref_chosen_B, self.rejected_B - self.ref_rejected_B


def answer_logps(log_probs_BW: torch.Tensor, mask_BW: torch.Tensor, ld_alpha: float | None) -> torch.Tensor:
    """Log-probability of each answer, `[2B]`, from those of its tokens, `[2B, W]`, 0 where `mask_BW` is 0.

    Supervised tokens beyond the other answer's length weigh `ld_alpha` (LD-DPO, arXiv 2409.06411); None: 1.
    """
    if ld_alpha is None:
        return log_probs_BW.sum(1)
    shorter_B = torch.minimum(*mask_BW.sum(1).chunk(2)).repeat(2)
    beyond_BW = mask_BW.cumsum(1) > shorter_B.unsqueeze(1)
    return torch.where(beyond_BW, ld_alpha * log_probs_BW, log_probs_BW).sum(1)


def pair_weights(log_probs_BW: torch.Tensor, log_sum_sq_probs_BW: torch.Tensor, mask_BW: torch.Tensor) -> torch.Tensor:
    """Weight of each pair, `[B]`, without gradient (WPO, arXiv 2406.11827, eq. 2).

    exp(mean over tokens of log p - log sum_v p_v^2), multiplied over both answers.
    """
    aligned_BW = (log_probs_BW - log_sum_sq_probs_BW).detach() * mask_BW
    chosen_B, rejected_B = (aligned_BW.sum(1) / mask_BW.sum(1).clamp(min=1)).exp().chunk(2)
    return chosen_B * rejected_B


def dpo_losses(logps: PairLogps, settings: DpoSettings) -> torch.Tensor:
    """The weighted sum of `settings.loss_type` for each pair, `[B]`; `sft`, a mean over tokens, is not part of it."""
    weights = loss_weights(settings)
    total_B = torch.zeros_like(logps.chosen_B)
    for name, weight in weights.items():
        if name != "sft":
            total_B = total_B + weight * LOSSES[name](logps, settings)
    return total_B


def loss_weights(settings: DpoSettings) -> dict[str, float]:
    """The weight of each loss of the recipe."""
    weights = settings.loss_weights or [1.0] * len(settings.loss_type)
    return dict(zip(settings.loss_type, weights, strict=True))


def divergence_score(log_ratio: torch.Tensor, settings: DpoSettings) -> torch.Tensor:
    """f'(t) at t = pi / pi_ref, up to a constant (f-DPO, arXiv 2309.16240, table 1).

    reverse_kl: log t; forward_kl: 1 - 1 / t; js_divergence: log(2 t / (t + 1)); alpha_divergence:
    (t^(alpha - 1) - 1) / (alpha - 1), which is log t at alpha = 1, and of which the exponent is capped at 80.
    """
    power = settings.f_alpha_divergence_coef - 1
    match settings.f_divergence_type:
        case "forward_kl":
            return 1 - torch.exp(-log_ratio)
        case "js_divergence":
            return math.log(2) + logsigmoid(log_ratio)
        case "alpha_divergence" if abs(power) >= 1e-6:
            return (torch.exp((power * log_ratio).clamp(max=80.0)) - 1) / power
    return log_ratio


def _margin(logps: PairLogps, settings: DpoSettings) -> torch.Tensor:
    """beta (f'(t_chosen) - f'(t_rejected)): the difference of the rewards where the divergence is reverse_kl."""
    chosen_B, rejected_B = (divergence_score(ratio_B, settings) for ratio_B in logps.log_ratios())
    return settings.beta * (chosen_B - rejected_B)


def _token_margin(logps: PairLogps, settings: DpoSettings) -> torch.Tensor:
    """The difference of the scores per supervised token, without beta."""
    chosen_B, rejected_B = (divergence_score(ratio_B, settings) for ratio_B in logps.log_ratios())
    return chosen_B / logps.chosen_tokens_B.clamp(min=1) - rejected_B / logps.rejected_tokens_B.clamp(min=1)


def _smoothed(margin_B: torch.Tensor, smoothing: float) -> torch.Tensor:
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m) (conservative DPO, arXiv 2305.18290)."""
    return -logsigmoid(margin_B) * (1 - smoothing) - logsigmoid(-margin_B) * smoothing


def sigmoid(logps: PairLogps, settings: DpoSettings) -> torch.Tensor:
    """-log sigmoid(m) (DPO, arXiv 2305.18290, eq. 7)."""
    return -logsigmoid(_margin(logps, settings))


def sigmoid_norm(logps: PairLogps, settings: DpoSettings) -> torch.Tensor:
    """-log sigmoid of beta times the difference per token (Tulu 3, arXiv 2411.15124, eq. 6)."""
    return -logsigmoid(settings.beta * _token_margin(logps, settings))


def hinge(logps: PairLogps, settings: DpoSettings) -> torch.Tensor:
    """max(0, 1 - m) (SLiC, arXiv 2305.10425, on DPO's margin as in RSO, arXiv 2309.06657)."""
    return torch.relu(1 - _margin(logps, settings))


def ipo(logps: PairLogps, settings: DpoSettings) -> torch.Tensor:
    """(d - 1 / (2 beta))^2, with d the difference per token (IPO, arXiv 2310.12036, eq. 17)."""
    return (_token_margin(logps, settings) - 1 / (2 * settings.beta)) ** 2


def exo_pair(logps: PairLogps, settings: DpoSettings) -> torch.Tensor:
    """KL of (sigmoid(m), sigmoid(-m)) from (1 - e, e), e the label smoothing (EXO, arXiv 2402.00856, eq. 16)."""
    margin_B, smoothing = _margin(logps, settings), settings.label_smoothing
    chosen_B = torch.sigmoid(margin_B) * (logsigmoid(margin_B) - math.log1p(-smoothing))
    return chosen_B + torch.sigmoid(-margin_B) * (logsigmoid(-margin_B) - math.log(smoothing))


def nca_pair(logps: PairLogps, settings: DpoSettings) -> torch.Tensor:
    """-log sigmoid(r_c) - 0.5 log sigmoid(-r_c) - 0.5 log sigmoid(-r_r), rewards r (NCA, arXiv 2402.05369)."""
    chosen_B, rejected_B = (settings.beta * ratio_B for ratio_B in logps.log_ratios())
    return -logsigmoid(chosen_B) - 0.5 * logsigmoid(-chosen_B) - 0.5 * logsigmoid(-rejected_B)


def robust(logps: PairLogps, settings: DpoSettings) -> torch.Tensor:
    """(-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2 e), e the share of swapped labels (arXiv 2403.00409)."""
    margin_B, smoothing = _margin(logps, settings), settings.label_smoothing
    return (smoothing * logsigmoid(-margin_B) - (1 - smoothing) * logsigmoid(margin_B)) / (1 - 2 * smoothing)


def bco_pair(logps: PairLogps, settings: DpoSettings) -> torch.Tensor:
    """-log sigmoid(r_c) - log sigmoid(-r_r), rewards r without BCO's shift (arXiv 2404.04656)."""
    chosen_B, rejected_B = logps.log_ratios()
    return -logsigmoid(settings.beta * chosen_B) - logsigmoid(-settings.beta * rejected_B)


def sppo_hard(logps: PairLogps, settings: DpoSettings) -> torch.Tensor:
    """(log t_c - 1 / (2 beta))^2 + (log t_r + 1 / (2 beta))^2 (SPPO, arXiv 2405.00675, eq. 4.7 with P of 1 and 0)."""
    chosen_B, rejected_B = logps.log_ratios()
    return (chosen_B - 0.5 / settings.beta) ** 2 + (rejected_B + 0.5 / settings.beta) ** 2


def aot(logps: PairLogps, settings: DpoSettings) -> torch.Tensor:
    """Smoothed sigmoid loss of log pi_c / pi_r against the reference's, both sorted (AOT, arXiv 2406.05882)."""
    policy_B, reference_B = logps.chosen_B - logps.rejected_B, logps.ref_chosen_B - logps.ref_rejected_B
    margin_B = settings.beta * (policy_B.sort().values - reference_B.sort().values)
    return _smoothed(margin_B, settings.label_smoothing)


def aot_unpaired(logps: PairLogps, settings: DpoSettings) -> torch.Tensor:
    """Smoothed sigmoid loss of the sorted log-ratios of chosen and rejected answers (AOT, arXiv 2406.05882)."""
    chosen_B, rejected_B = (ratio_B.sort().values for ratio_B in logps.log_ratios())
    return _smoothed(settings.beta * (chosen_B - rejected_B), settings.label_smoothing)


def apo_zero(logps: PairLogps, settings: DpoSettings) -> torch.Tensor:
    """1 - sigmoid(r_c) + sigmoid(r_r), rewards r (APO, arXiv 2408.06266, eq. 7)."""
    chosen_B, rejected_B = logps.log_ratios()
    return 1 - torch.sigmoid(settings.beta * chosen_B) + torch.sigmoid(settings.beta * rejected_B)


def apo_down(logps: PairLogps, settings: DpoSettings) -> torch.Tensor:
    """sigmoid(r_c) + 1 - sigmoid(r_c - r_r), rewards r (APO, arXiv 2408.06266, eq. 8)."""
    chosen_B, rejected_B = logps.log_ratios()
    return torch.sigmoid(settings.beta * chosen_B) + 1 - torch.sigmoid(settings.beta * (chosen_B - rejected_B))


def discopop(logps: PairLogps, settings: DpoSettings) -> torch.Tensor:
    """(1 - s) (-log sigmoid(m)) + s exp(-m) with s = sigmoid(m / tau) (DiscoPOP, arXiv 2406.08414, eq. 5)."""
    margin_B = _margin(logps, settings)
    mixture_B = torch.sigmoid(margin_B / settings.discopop_tau)
    return -logsigmoid(margin_B) * (1 - mixture_B) + torch.exp(-margin_B) * mixture_B


LOSSES: Mapping[str, Callable[[PairLogps, DpoSettings], torch.Tensor]] = {
    loss.__name__: loss
    for loss in (
        *(sigmoid, sigmoid_norm, hinge, ipo, exo_pair, nca_pair, robust),
        *(bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop),
    )
}
"""By the name that a recipe gives it in `method.loss_type`."""
