"""Check before the first step that the policy equals its reference: every reward must be 0."""

from collections.abc import Sequence

import torch

from finetune.errors import Problem, RunError
from finetune.methods.dpo import MoeDpoTrainer
from finetune.methods.pair_scores import score_pairs

TOLERANCE = {torch.float32: 1e-4}
LOW_PRECISION = 1e-2


def check_start(trainer: MoeDpoTrainer, rows: Sequence[Sequence[int]]) -> None:
    """Raise RunError if the reward margin of a pair in these training rows is not 0; the message names the cause.

    The tolerance is 1e-4, and 1e-2 where the model computes in 16 bits.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    inputs = trainer.batch_of("train", rows)
    training = model.training
    model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        policy_2B = trainer.answer_logps(score_pairs(model, inputs, trainer.attention), inputs)
        live_2B = trainer.reference_logps(inputs)
    model.train(training)
    names = ("ref_chosen_logps", "ref_rejected_logps")
    used_2B = live_2B if trainer.live else torch.cat([inputs[name] for name in names])
    tolerance = TOLERANCE.get(model.dtype, LOW_PRECISION)
    margin_B = _margin(trainer.method.beta * (policy_2B - used_2B))
    worst = int(margin_B.abs().argmax())
    if margin_B.abs()[worst] <= tolerance:
        return
    if _margin(trainer.method.beta * (policy_2B - live_2B)).abs()[worst] > tolerance:
        differs = "the adapter: the one that is trained does not start as the reference's"
    else:
        differs = "the base: its log-probabilities are not those that were kept, of the same rows and adapter"
        if tolerance == LOW_PRECISION:
            differs += " (in 16 bits it is enough that they were computed in other micro-batches)"
    raise RunError(
        Problem(
            inputs["rows"][worst],
            f"before the first step this pair's reward margin is not 0 within {tolerance:g}; what differs is {differs}",
            "remove the folder reference/ of the run so that it is computed again; if that does not help, report it",
            got=f"{margin_B[worst].item():.3g}",
        )
    )


def _margin(rewards_2B: torch.Tensor) -> torch.Tensor:
    chosen_B, rejected_B = rewards_2B.chunk(2)
    return chosen_B - rejected_B
