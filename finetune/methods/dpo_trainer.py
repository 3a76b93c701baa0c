"""The DPO trainer: losses on pairs of answers, the router term, and one quantised base for policy and reference.

B pairs, W tokens of the longest answer; in `2B` the chosen answers come before the rejected ones.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from finetune.methods.dpo_losses import PairLogps, answer_logps, dpo_losses, loss_weights, pair_weights
from finetune.methods.pairs import RoutingOverlap, score_pairs
from finetune.methods.reference import Reference
from finetune.methods.run_trainer import RunTrainer
from finetune.moe.router import capture
from finetune.recipe import DpoSettings
from finetune.upstream import require

require("trl.trainer.dpo_trainer:DPOTrainer._prepare_dataset")


class MoeDpoTrainer(RunTrainer, DPOTrainer):  # type: ignore[misc]
    """TRL's DPOTrainer on pairs tokenised by `finetune.data`, in the layouts of `PairCollator`.

    One forward gives the log-probabilities of both answers (`score_pairs`), `dpo_losses` the loss of each pair. A
    micro-batch adds its share of the mean over the pairs of the step, and of the mean over tokens for the loss `sft`.
    """

    # The micro-batch's loss is normalised by the step's pairs; nothing is left for transformers to divide by.
    loss_is_scaled_for_ga = True
    accelerator: Any
    sums = (
        *("loss", "pairs", "chosen_rewards", "rejected_rewards", "correct", "chosen_logps", "rejected_logps"),
        *("chosen_tokens", "chosen_nll", "top1", "tokens", "entropy", "chosen_logits", "rejected_logits"),
    )

    def __init__(self, *args: Any, method: DpoSettings, reference: Reference, attention: str, **kwargs: Any) -> None:
        super().__init__(*args, ref_model=reference, **kwargs)
        self.method, self.reference, self.attention = method, reference, attention
        self.live = method.reference == "live"
        self._sft_weight = loss_weights(method).get("sft", 0.0)
        self.overlap = None if self.router_term is None else RoutingOverlap(self.router_term.routers)
        self._step_pairs = self._step_chosen = torch.ones(())

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """Nothing to do: the rows are pairs of token ids already."""
        return dataset

    def begin_step(self, samples: list[Any], device: torch.device) -> None:
        """Also count the step's pairs and the supervised tokens of its chosen answers, over all ranks."""
        super().begin_step(samples, device)
        chosen = [sample["completion_mask"].chunk(2)[0] for sample in samples]
        tokens = torch.stack([mask.sum() for mask in chosen]).sum().to(device)
        counts = torch.stack([tokens, tokens.new_tensor(sum(map(len, chosen)))])
        self._step_chosen, self._step_pairs = self.sum_over_ranks(counts).float().clamp(min=1).unbind()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's share of the step's loss, plus its share of the router term."""
        if self.live:
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = self.reference_logps(inputs).chunk(2)
        if not self.model.training:
            return self._evaluation_loss(model, inputs)
        if self.overlap is not None and self.will_log and not self._step_losses:
            self._compare_routing(self.overlap, inputs)
        term = self.router_term
        with nullcontext() if term is None else term.capture() as record:
            scores = score_pairs(model, inputs, self.attention)
        pairs = len(inputs["ref_chosen_logps"])
        loss = self._pair_losses(scores, inputs).sum() / self._step_pairs
        if self._sft_weight:
            loss = loss - self._sft_weight * scores.log_probs[:pairs].sum() / self._step_chosen
        self._count(scores, inputs, loss)
        return self.with_router_term(loss * self.accelerator.num_processes, record, inputs)

    def batch_of(self, split: str, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """A micro-batch of some pairs of a split, on the device; pairs of one row are packed together."""
        features = [{"pairs": list(pairs), "split": split} for pairs in rows]
        batch: dict[str, Any] = self._prepare_inputs(self.data_collator(features))
        return batch

    def reference_logps(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Log-probabilities of the answers under the reference, `[2B]`."""
        with self.reference.active() as model:
            return self.answer_logps(score_pairs(model, inputs, self.attention), inputs)

    def answer_logps(self, scores: FusedCausalLMOutput, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Log-probabilities of the answers, `[2B]`, from those of their tokens."""
        return answer_logps(scores.log_probs, inputs["completion_mask"], self.method.ld_alpha)

    def _compare_routing(self, overlap: RoutingOverlap, inputs: Mapping[str, Any]) -> None:
        """Compare the routing of the step's first pair with the reference's, and that of its two answers.

        One pair, whatever the step is cut into. The other processes make the same forwards, of no pair.
        """
        probe = self.batch_of("train", [[index] for _, index in inputs["pairs"][:1] if self.is_world_process_zero()])
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        with torch.no_grad(), capture(overlap.routers) as record:
            score_pairs(model, probe, self.attention)
        model.train()
        with self.reference.active(), capture(overlap.routers) as reference:
            score_pairs(model, probe, self.attention)
        overlap.compare_models(record, reference, self.weights(probe))
        overlap.compare_answers(record, probe)

    def _pair_losses(self, scores: FusedCausalLMOutput, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The loss of each pair, `[B]`, without the part that is a mean over tokens."""
        mask_BW = inputs["completion_mask"]
        chosen_B, rejected_B = self.answer_logps(scores, inputs).chunk(2)
        chosen_tokens_B, rejected_tokens_B = mask_BW.sum(1).chunk(2)
        ref_chosen_B, ref_rejected_B = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        logps = PairLogps(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, chosen_tokens_B, rejected_tokens_B)
        losses_B = dpo_losses(logps, self.method)
        if self.method.use_weighting:
            losses_B = losses_B * pair_weights(scores.log_probs, scores.log_sum_sq_probs, mask_BW)
        return losses_B

    def _evaluation_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Without the router term; the mean over the batch's pairs."""
        scores = score_pairs(model, inputs, self.attention)
        loss = self._pair_losses(scores, inputs).sum()
        self._count(scores, inputs, loss)
        return loss / max(len(inputs["ref_chosen_logps"]), 1)

    def _count(self, scores: FusedCausalLMOutput, inputs: Mapping[str, Any], loss: torch.Tensor) -> None:
        mask_BW = inputs["completion_mask"]
        logps_B = self.answer_logps(scores, inputs).detach()
        chosen_B, rejected_B = logps_B.chunk(2)
        chosen_rewards = self.method.beta * (chosen_B - inputs["ref_chosen_logps"])
        rejected_rewards = self.method.beta * (rejected_B - inputs["ref_rejected_logps"])
        chosen_mask = mask_BW.chunk(2)[0]
        logits = (scores.mean_logits * mask_BW).chunk(2)
        self.count(
            loss=loss,
            pairs=loss.new_tensor(len(chosen_B)),
            chosen_rewards=chosen_rewards.sum(),
            rejected_rewards=rejected_rewards.sum(),
            correct=(chosen_rewards > rejected_rewards).sum(),
            chosen_logps=chosen_B.sum(),
            rejected_logps=rejected_B.sum(),
            chosen_tokens=chosen_mask.sum(),
            chosen_nll=-scores.log_probs.chunk(2)[0].sum(),
            top1=(scores.is_top1.chunk(2)[0] * chosen_mask).sum(),
            tokens=mask_BW.sum(),
            entropy=(scores.entropy * mask_BW).sum(),
            chosen_logits=logits[0].sum(),
            rejected_logits=logits[1].sum(),
        )

    def figures(self, sums: dict[str, float], steps: int) -> dict[str, float]:
        """The mean loss of the steps without the router term, the figures of the pairs and the routing overlap."""
        overlap = {} if self.overlap is None else self.overlap.figures(self.sum_over_ranks)
        return {"dpo_loss": sums["loss"] / steps, **_pair_figures(sums), **overlap, "num_tokens": self.num_tokens}

    def evaluation_figures(self, sums: dict[str, float]) -> dict[str, float]:
        """The loss as the mean over pairs (of the cross entropy, where it is a part, over tokens)."""
        sft = self._sft_weight * sums["chosen_nll"] / max(sums["chosen_tokens"], 1.0)
        return {"loss": sums["loss"] / max(sums["pairs"], 1.0) + sft, **_pair_figures(sums)}


def _pair_figures(sums: dict[str, float]) -> dict[str, float]:
    """TRL's names, as exact means over all pairs and their supervised tokens."""
    pairs, tokens, chosen = (max(sums[name], 1.0) for name in ("pairs", "tokens", "chosen_tokens"))
    return {
        "rewards/chosen": sums["chosen_rewards"] / pairs,
        "rewards/rejected": sums["rejected_rewards"] / pairs,
        "rewards/margins": (sums["chosen_rewards"] - sums["rejected_rewards"]) / pairs,
        "rewards/accuracies": sums["correct"] / pairs,
        "logps/chosen": sums["chosen_logps"] / pairs,
        "logps/rejected": sums["rejected_logps"] / pairs,
        "logits/chosen": sums["chosen_logits"] / chosen,
        "logits/rejected": sums["rejected_logits"] / max(sums["tokens"] - sums["chosen_tokens"], 1.0),
        "mean_token_accuracy": sums["top1"] / chosen,
        "entropy": sums["entropy"] / tokens,
    }
